"""Upsampling layers against torch, TensorFlow's stored outputs, scipy, brute force and what defines them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.upsampling import (
    conv_matrix,
    conv_output_size,
    conv_transpose2d,
    conv_transpose_output_size,
    cubic_kernel,
    icnr_,
    interpolate,
    interpolation_matrix,
    max_pool,
    max_unpool,
    overlap_counts,
    pixel_shuffle,
    pixel_unshuffle,
    source_coordinate,
    subpixel_as_conv_transpose,
)

TENSORFLOW = json.loads((Path(__file__).parent / "data" / "upsampling" / "tf_resize_conv.json").read_text("utf-8"))
AXES = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2, "lanczos": 2}
EXACT = ("nearest", "nearest-exact")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@st.composite
def resizings(draw, modes):
    """A shape, and arguments for interpolate that torch takes, too."""
    mode = draw(st.sampled_from(modes))
    axes = AXES.get(mode) or draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 9), min_size=axes, max_size=axes))
    given = {"mode": mode}
    if draw(st.booleans()):
        given["size"] = tuple(draw(st.lists(st.integers(1, 13), min_size=axes, max_size=axes)))
        sizes = given["size"]
    else:
        factor = st.one_of(st.floats(0.2, 3.3), st.sampled_from([0.5, 1.0, 1.5, 2.0, 1 / 3, 1.4, 3.0]))
        given["scale_factor"] = tuple(draw(st.lists(factor, min_size=axes, max_size=axes)))
        given["recompute_scale_factor"] = draw(st.sampled_from([None, True, False]))
        sizes = [int(n * f) for n, f in zip(spatial, given["scale_factor"], strict=True)]
        assume(min(sizes) > 0)
    if mode in ("linear", "bilinear", "trilinear", "bicubic"):
        given["align_corners"] = draw(st.sampled_from([None, True, False]))
    if mode == "lanczos" or (mode in ("bilinear", "bicubic") and draw(st.booleans())):
        given["antialias"] = True
        assume(sizes[1] > 1)  # torch 2.13 is wrong there: see test_torch_and_a_single_column
    return (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *spatial), given


class TestInterpolation:
    @given(resizings([*EXACT, "area", *AXES]))
    def test_equals_torch(self, resizing):
        shape, given = resizing
        x = normal(*shape)
        ours, theirs = interpolate(x, **given), F.interpolate(torch.tensor(x), **given).numpy()
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= (0 if given["mode"] in EXACT else 1e-10)

    @pytest.mark.parametrize("mode", EXACT)
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    @pytest.mark.parametrize(
        "n, m",
        [
            ((39,), (33,)),
            ((14,), (23,)),
            ((26, 26), (22, 22)),
            ((14, 14), (23, 23)),
            ((40, 41), (92, 82)),
            ((200, 39), (150, 33)),
            ((12, 26, 28), (10, 11, 12)),
        ],
    )
    def test_nearest_rounds_as_torch_does(self, n, m, dtype, mode):
        """Products with the step lie next to whole numbers; the precision of torch's program for the case decides."""
        x = np.arange(np.prod(n)).reshape(1, 1, *n).astype(dtype)
        assert (interpolate(x, m, mode=mode) == F.interpolate(torch.tensor(x), m, mode=mode).numpy()).all()

    @given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(EXACT))
    def test_nearest_rounds_as_torch_does_anywhere(self, n, m, mode):
        x = np.arange(float(n))[None, None]
        assert (interpolate(x, m, mode=mode) == F.interpolate(torch.tensor(x), m, mode=mode).numpy()).all()

    @pytest.mark.parametrize("n, factor", [(3, 2.088), (3, 1.2), (2, 1.4), (6, 1.16)])
    @pytest.mark.parametrize("axes", [1, 2, 3])
    @pytest.mark.parametrize("mode", EXACT)
    def test_a_factor_that_is_not_the_ratio_of_the_sizes(self, n, factor, axes, mode):
        """Torch has a short cut to the same size and to twice of it, for nearest in two dimensions only."""
        x = normal(1, 1, *[n] * axes)
        theirs = F.interpolate(torch.tensor(x), scale_factor=factor, mode=mode).numpy()
        assert (interpolate(x, scale_factor=factor, mode=mode) == theirs).all()

    def test_torch_and_a_single_column(self):
        """Torch 2.13 with antialias returns the first pixel everywhere when the output is one column wide."""
        x = np.arange(5.0).reshape(1, 1, 5, 1)
        ours = interpolate(x, (7, 1), mode="bilinear", antialias=True)
        lying = F.interpolate(torch.tensor(x.reshape(1, 1, 1, 5)), (1, 7), mode="bilinear", antialias=True).numpy()
        assert np.abs(ours.ravel() - lying.ravel()).max() < 1e-12

    @pytest.mark.parametrize("size", [(6, 8), (5, 7), (2, 3)])
    @pytest.mark.parametrize("theirs, ours", [("bilinear", "bilinear"), ("nearest", "nearest-exact")])
    def test_equals_tensorflow(self, size, theirs, ours):
        x = np.array(TENSORFLOW["input_nhwc"])
        golden = np.array(TENSORFLOW[f"tf.image.resize/{theirs}/{size[0]}x{size[1]}"])
        assert np.abs(interpolate(x[None, None], size, mode=ours)[0, 0] / golden - 1).max() < 1e-6  # float32

    def test_tensorflows_aligned_corners(self):
        x, golden = np.array(TENSORFLOW["input_nhwc"]), np.array(TENSORFLOW["v1.resize_bilinear/ac1/hp0/6x8"])
        ours = interpolate(x[None, None], (6, 8), mode="bilinear", align_corners=True)[0, 0]
        assert np.abs(ours - golden).max() < 1e-6

    def test_tensorflows_bicubic_has_another_kernel(self):
        x, golden = np.array(TENSORFLOW["input_nhwc"]), np.array(TENSORFLOW["tf.image.resize/bicubic/6x8"])
        assert np.abs(interpolate(x[None, None], (6, 8), mode="bicubic")[0, 0] - golden).max() > 0.05

    @given(st.integers(2, 9), st.integers(2, 20))
    def test_aligned_linear_is_a_spline_of_order_1(self, n_in, n_out):
        x = normal(n_in)
        at = source_coordinate(n_in, n_out, align_corners=True)
        spline = scipy.ndimage.map_coordinates(x, [at], order=1)
        assert np.abs(interpolation_matrix(n_in, n_out, "linear", align_corners=True) @ x - spline).max() < 1e-12

    @given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([*EXACT, "area", "linear", "cubic"]), st.booleans())
    def test_rows_sum_to_1(self, n_in, n_out, mode, align_corners):
        matrix = interpolation_matrix(n_in, n_out, mode, align_corners and mode in ("linear", "cubic"))
        assert matrix.shape == (n_out, n_in)
        assert np.abs(matrix.sum(1) - 1).max() < 1e-12

    def test_linear_keeps_a_straight_line_inside_and_torchs_cubic_does_not(self):
        at = source_coordinate(40, 97)
        inside = (at > 2) & (at < 37)
        for mode, low, high in (("linear", 0, 1e-12), ("cubic", 0.01, 0.2)):
            off = np.abs(interpolation_matrix(40, 97, mode) @ np.arange(40.0) - at)[inside].max()
            assert low <= off < high

    def test_the_cubic_kernel_with_half_keeps_parabolas(self):
        for t in np.linspace(0, 1, 11):
            taps = np.arange(-1, 3)
            assert cubic_kernel(t - taps, -0.5) @ taps**2 == pytest.approx(t**2)
            assert cubic_kernel(t - taps).sum() == pytest.approx(1)

    @pytest.mark.parametrize(
        "given, problem",
        [
            (("nearest", True), "no meaning for nearest"),
            (("area", False, None, True), "no meaning for area"),
            (("linear", False, -2), "scale must be positive, got -2"),
            (("cubic", False, 0), "scale must be positive, got 0"),
            (("quadratic",), "must be one of .*got 'quadratic'"),
        ],
    )
    def test_matrices_that_cannot_be(self, given, problem):
        with pytest.raises(ValueError, match=problem):
            interpolation_matrix(4, 8, *given)

    def test_dtypes(self):
        image = np.arange(12, dtype=np.uint8).reshape(1, 1, 3, 4)
        assert interpolate(image, scale_factor=2).dtype == np.uint8
        assert interpolate(image, scale_factor=2, mode="bilinear").dtype == np.float64
        assert interpolate(image.astype(np.float32), scale_factor=2, mode="bicubic").dtype == np.float32
        assert interpolate(torch.ones(1, 1, 2, 2), scale_factor=2).shape == (1, 1, 4, 4)

    @pytest.mark.parametrize(
        "given, problem",
        [
            ({"scale_factor": 2, "mode": "cubic"}, "mode must be one of nearest, .*got 'cubic'"),
            ({"scale_factor": 2, "mode": "linear"}, r"linear needs an array .*1 spatial axes.*\(1, 1, 3, 4\)"),
            ({}, "either size or scale_factor"),
            ({"size": 3, "scale_factor": 2}, "either size or scale_factor"),
            ({"size": (3, 3, 3)}, "size must be a number or 2 of them"),
            ({"size": 2.5}, "size must be made of integers, got 2.5"),
            ({"size": 0}, "at least 1, got 3 inputs and 0 outputs"),
            ({"scale_factor": 0.1}, "at least 1"),
            ({"scale_factor": -1}, "must be positive, got -1"),
            ({"scale_factor": float("nan")}, "must be positive, got nan"),
            ({"size": 3, "recompute_scale_factor": True}, "needs a scale_factor"),
            ({"size": 3, "align_corners": True}, "no meaning for nearest"),
            ({"size": 3, "mode": "area", "antialias": True}, "not for area"),
            ({"size": 3, "mode": "lanczos"}, "needs antialias=True"),
        ],
    )
    def test_what_cannot_be_is_named(self, given, problem):
        with pytest.raises(ValueError, match=problem):
            interpolate(np.ones((1, 1, 3, 4)), **given)


@st.composite
def convolutions(draw):
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    given = {
        "stride": draw(pair(1, 3)),
        "padding": draw(pair(0, 3)),
        "output_padding": draw(pair(0, 2)),
        "dilation": draw(pair(1, 3)),
        "groups": groups,
    }
    assume(
        all(
            o < max(s, d) for o, s, d in zip(*(given[n] for n in ("output_padding", "stride", "dilation")), strict=True)
        )
    )
    kernel, size = draw(pair(1, 4)), draw(pair(1, 5))
    per_axis = zip(size, kernel, *(given[n] for n in ("stride", "padding", "output_padding", "dilation")), strict=True)
    assume(min(conv_transpose_output_size(*v) for v in per_axis) > 0)
    return normal(2, channels, *size), normal(channels, out, *kernel, seed=1), normal(out * groups, seed=2), given


class TestTransposedConvolution:
    @given(convolutions())
    def test_equals_torch(self, convolution):
        x, weight, bias, given = convolution
        theirs = F.conv_transpose2d(*map(torch.tensor, (x, weight, bias)), **given).numpy()
        ours = conv_transpose2d(x, weight, bias, **given)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-10

    @given(convolutions())
    def test_is_the_adjoint_of_convolution(self, convolution):
        """⟨Cx, y⟩ = ⟨x, Cᵀy⟩, with torch's convolution as C."""
        y, weight, _, given = convolution
        adjoint = conv_transpose2d(y, weight, **given)
        x = normal(*adjoint.shape, seed=3)
        del given["output_padding"]
        forward = F.conv2d(torch.tensor(x), torch.tensor(weight), **given).numpy()
        forward = forward[..., : y.shape[2], : y.shape[3]]
        assert np.vdot(forward, y) == pytest.approx(np.vdot(x, adjoint), rel=1e-10, abs=1e-10)

    @given(convolutions())
    def test_the_matrix_is_torchs_convolution_and_its_transpose_is_ours(self, convolution):
        y, weight, _, given = convolution
        adjoint = conv_transpose2d(y, weight, **given)
        given["output_padding"], extra = (0, 0), given["output_padding"]
        assume(all(n > e for n, e in zip(adjoint.shape[2:], extra, strict=True)))
        exact = conv_transpose2d(y, weight, **given)
        assert exact.shape[2:] == tuple(n - e for n, e in zip(adjoint.shape[2:], extra, strict=True))
        del given["output_padding"]
        matrix = conv_matrix(weight, exact.shape[2:], **given)
        x = normal(*exact.shape, seed=3)
        theirs = F.conv2d(torch.tensor(x), torch.tensor(weight), **given).numpy()
        assert np.abs(x.reshape(2, -1) @ matrix.T - theirs.reshape(2, -1)).max() < 1e-10
        assert np.abs(y.reshape(2, -1) @ matrix - exact.reshape(2, -1)).max() < 1e-10

    def test_by_hand(self):
        assert conv_transpose2d([[[[1.0, 2.0]]]], np.ones((1, 1, 1, 3)), stride=2).ravel().tolist() == [1, 1, 3, 2, 2]

    @pytest.mark.parametrize("kind, size, padding", [("SAME", 6, (0, 1)), ("SAME", 5, (1, 1)), ("VALID", 7, (0, 0))])
    def test_tensorflow_crops_elsewhere(self, kind, size, padding):
        golden = TENSORFLOW["conv2d_transpose"]
        full = conv_transpose2d([[golden["in"]]], [[golden["kernel"]]], stride=2)[0, 0]
        cropped = full[padding[0] : 7 - padding[1], padding[0] : 7 - padding[1]]
        assert (cropped == golden[f"stride2_{kind}_{size}x{size}"]).all()

    @given(*(st.integers(1, 5) for _ in range(5)))
    def test_sizes(self, n, kernel, stride, padding, dilation):
        size = conv_transpose_output_size(n, kernel, stride, padding, 0, dilation)
        assume(size > 0)
        sizes = {conv_output_size(m, kernel, stride, padding, dilation) for m in range(size, size + stride)}
        assert sizes == {n}  # output padding chooses among these

    @given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
    def test_overlaps_are_a_transposed_convolution_of_ones(self, n, kernel, stride, dilation):
        ones = F.conv_transpose1d(torch.ones(1, 1, n), torch.ones(1, 1, kernel), stride=stride, dilation=dilation)
        assert overlap_counts(n, kernel, stride, dilation).tolist() == ones[0, 0].tolist()

    def test_interior_overlaps(self):
        assert overlap_counts(9, 3, 2)[8:10].tolist() == [2, 1]
        assert overlap_counts(9, 5, 3)[12:15].tolist() == [2, 2, 1]
        for kernel in range(1, 9):
            for stride in range(1, 5):
                inside = overlap_counts(20, kernel, stride)[kernel : -kernel - stride]
                assert (len(set(inside.tolist())) == 1) == (kernel % stride == 0)

    @pytest.mark.parametrize(
        "given, problem",
        [
            ({"stride": 0}, "stride must be an integer of at least 1 or a pair of them, got 0"),
            ({"padding": -1}, "padding must be an integer of at least 0"),
            ({"stride": (1, 2, 3)}, "stride must be an integer"),
            ({"dilation": 1.5}, "dilation must be an integer"),
            (
                {"output_padding": 1},
                r"output_padding \(1, 1\) must be smaller than stride \(1, 1\) or dilation \(1, 1\)",
            ),
            ({"groups": 3}, "2 channels cannot be divided into 3 groups"),
            ({"padding": 9}, "leaves nothing of the output"),
            ({"bias": [1.0]}, r"bias must have shape \(3,\), got \(1,\)"),
        ],
    )
    def test_what_cannot_be_is_named(self, given, problem):
        with pytest.raises(ValueError, match=problem):
            conv_transpose2d(np.ones((1, 2, 4, 4)), np.ones((2, 3, 3, 3)), **given)

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match=r"\(batch, 2, height, width\) to fit the weight, got \(1, 5, 4, 4\)"):
            conv_transpose2d(np.ones((1, 5, 4, 4)), np.ones((2, 3, 3, 3)))
        for weight in (np.ones((2, 3)), np.ones((5, 1, 0, 3))):
            with pytest.raises(ValueError, match="weight must have 4 axes and not be empty"):
                conv_transpose2d(np.ones((1, 5, 4, 4)), weight)
        with pytest.raises(ValueError, match="does not fit into"):
            conv_matrix(np.ones((1, 1, 5, 5)), (3, 3))
        with pytest.raises(ValueError, match="at least 1, got n=3, kernel=0"):
            overlap_counts(3, 0, 1)


class TestPixelShuffle:
    @given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
    def test_equals_torch_and_back(self, r, c, h, w, batch):
        x = normal(*[2] * batch, c * r * r, h, w)
        shuffled = pixel_shuffle(x, r)
        assert (shuffled == F.pixel_shuffle(torch.tensor(x), r).numpy()).all()
        assert (pixel_unshuffle(shuffled, r) == x).all()
        assert (F.pixel_unshuffle(torch.tensor(shuffled), r).numpy() == x).all()

    def test_tensorflow_orders_the_channels_otherwise(self):
        golden = TENSORFLOW["depth_to_space"]
        x, out = np.moveaxis(np.array(golden["in_nhwc"]), -1, 0), np.moveaxis(np.array(golden["out"]), -1, 0)
        c = len(out)
        assert (pixel_shuffle(x.reshape(4, c, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), 2) == out).all()
        assert (pixel_shuffle(x, 2) != out).any()

    @pytest.mark.parametrize("r, kernel, padding", [(1, 3, 1), (2, 3, 1), (3, 3, 0), (2, 5, 2), (3, 1, 0), (2, 4, 1)])
    def test_subpixel_convolution_is_a_transposed_convolution(self, r, kernel, padding):
        x, weight = normal(2, 3, 5, 4), normal(2 * r * r, 3, kernel, kernel, seed=1)
        shuffled = F.pixel_shuffle(F.conv2d(torch.tensor(x), torch.tensor(weight), padding=padding), r)
        stamp = torch.tensor(subpixel_as_conv_transpose(weight, r))
        transposed = conv_transpose2d(x, stamp, stride=r, padding=r * (kernel - 1 - padding))
        assert np.abs(shuffled.numpy() - transposed).max() < 1e-12

    @pytest.mark.parametrize("r", [1, 2, 3])
    def test_icnr_starts_as_nearest(self, r):
        layer = torch.nn.Conv2d(3, 2 * r * r, 3, padding=1, bias=False, dtype=torch.float64)
        assert icnr_(layer.weight, r) is layer.weight and layer.weight.requires_grad
        x = torch.tensor(normal(1, 3, 6, 6))
        small = F.conv2d(x, layer.weight[:: r * r], padding=1)
        nearest = F.interpolate(small, scale_factor=r)
        assert (F.pixel_shuffle(layer(x), r) - nearest).abs().max() < 1e-12
        assert layer.weight.std() > 0.05

    def test_what_cannot_be_is_named(self):
        with pytest.raises(ValueError, match=r"channels divisible by 2² = 4, height, width\), got \(1, 6, 2, 2\)"):
            pixel_shuffle(np.ones((1, 6, 2, 2)), 2)
        with pytest.raises(ValueError, match="height and width divisible by 2"):
            pixel_unshuffle(np.ones((1, 1, 3, 2)), 2)
        with pytest.raises(ValueError, match="pixel_shuffle by 0"):
            pixel_shuffle(np.ones((1, 4, 2, 2)), 0)
        with pytest.raises(ValueError, match="out channels divisible by 3² = 9"):
            icnr_(torch.ones(8, 1, 3, 3), 3)


class TestUnpooling:
    @given(
        arrays(
            float, st.tuples(*(st.integers(*r) for r in ((1, 2), (1, 2), (3, 8), (3, 8)))), elements=st.integers(0, 4)
        ),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.one_of(st.none(), st.integers(1, 3)),
    )
    def test_equals_torch_with_many_ties(self, x, kernel, stride):
        values, indices = F.max_pool2d(torch.tensor(x), kernel, stride, return_indices=True)
        ours, where = max_pool(x, kernel, stride)
        assert (ours == values.numpy()).all() and (where == indices.numpy()).all()
        back = F.max_unpool2d(values, indices, kernel, stride, output_size=x.shape[2:]).numpy()
        assert (max_unpool(ours, where, kernel, stride, x.shape[2:]) == back).all()

    def test_by_hand(self):
        values, indices = max_pool([[[[1, 2, 5, 0], [3, 4, 5, 1]]]], 2)
        assert (values.ravel().tolist(), indices.ravel().tolist()) == ([4, 5], [5, 2])
        assert max_unpool(values, indices, 2).tolist() == [[[[0, 0, 5, 0], [0, 4, 0, 0]]]]

    def test_what_cannot_be_is_named(self):
        with pytest.raises(ValueError, match="one shape"):
            max_unpool(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 1), int), 2)
        with pytest.raises(ValueError, match="index 99 lies outside of the output of 4 × 4 pixels"):
            max_unpool(np.ones((1, 1, 2, 2)), np.full((1, 1, 2, 2), 99), 2)
        for size in ((100, 100), (2, 2), 6):
            with pytest.raises(ValueError, match="output_size must lie within less than a stride"):
                max_unpool(np.ones((1, 1, 2, 2)), np.zeros((1, 1, 2, 2), int), 2, output_size=size)
        with pytest.raises(ValueError, match="indices must be integers, got float64"):
            max_unpool(np.ones((1, 1, 2, 2)), np.zeros((1, 1, 2, 2)), 2)
        with pytest.raises(ValueError, match="hold a window of"):
            max_pool(np.ones((1, 1, 2, 2)), 3)

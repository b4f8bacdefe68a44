"""Random features for softmax attention against closed forms, quadrature, scipy and the definition of attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.linear_attention import softmax_attention
from helpers.performer import (
    favor_attention,
    hyperbolic_features,
    orthogonal_features,
    positive_features,
    relative_variance,
    trig_features,
)

FEATURES = [positive_features, trig_features, hyperbolic_features]
every_kind = pytest.mark.parametrize("features", FEATURES, ids=lambda f: f.__name__.split("_")[0])
DOUBLE = torch.float64
# A test with a chance of error of 2e-5 each: 4.3 standard deviations.
SIGMAS = 4.3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE).to(dtype)


def pair(radius, cosine, d=16):
    """Two vectors of one length with a given cosine, in general position."""
    basis, _ = torch.linalg.qr(normal(d, 2, seed=7))
    k = cosine * basis[:, 0] + math.sqrt(1 - cosine**2) * basis[:, 1]
    return radius * basis[:, 0], radius * k


def gauss_hermite(function, variance):
    """E[function(x)] of a normal x with mean 0, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    return (weights * function(math.sqrt(variance) * nodes)).sum() / math.sqrt(2 * math.pi)


def attention_by_definition(q, k, v, projection, features, scale, causal):
    """Weights as an n × n matrix of plain inner products of features, with nothing rescaled."""
    phi, psi = (features(x * scale**0.5, projection) for x in (q, k))
    weights = phi @ psi.mT
    weights = weights.tril() if causal else weights
    return weights / weights.sum(-1, keepdim=True) @ v


def block_draws(count, m, d, seed=0, **options):
    generator = seeded(seed)
    return torch.stack([orthogonal_features(m, d, generator=generator, dtype=DOUBLE, **options) for _ in range(count)])


class TestDirections:
    @pytest.mark.parametrize("m, d", [(1, 1), (3, 1), (4, 4), (10, 4), (3, 8)])
    def test_blocks_are_orthogonal_and_independent_of_each_other(self, m, d):
        w = orthogonal_features(m, d, generator=seeded(), dtype=DOUBLE)
        assert w.shape == (m, d)
        cosines = torch.nn.functional.normalize(w, dim=-1) @ torch.nn.functional.normalize(w, dim=-1).T
        block = torch.arange(m) // d
        same = (block[:, None] == block) & ~torch.eye(m, dtype=torch.bool)
        assert cosines[same].abs().max() < 1e-12 if same.any() else True
        other = block[:, None] != block
        assert not other.any() or d == 1 or cosines[other].abs().min() > 1e-9

    def test_equals_gram_and_schmidt_on_the_same_draw(self):
        """Their method divides by lengths, so its R has a positive diagonal: what makes QR unique."""
        d = 6
        left = []
        for column in torch.randn(1, d, d, generator=seeded(8), dtype=DOUBLE)[0].T:
            for done in left:
                column = column - (done @ column) * done
            left.append(column / column.norm())
        ours = orthogonal_features(d, d, generator=seeded(8), norms="sqrt_d", dtype=DOUBLE) / d**0.5
        assert (ours - torch.stack(left)).abs().max() < 1e-10

    def test_lengths_are_redrawn_as_those_of_a_normal_vector(self):
        lengths = block_draws(300, 10, 6).norm(dim=-1)
        assert scipy.stats.kstest(lengths.flatten(), scipy.stats.chi(6).cdf).pvalue > 1e-4
        assert np.corrcoef(lengths[:, :2].T)[0, 1] == pytest.approx(0, abs=SIGMAS / math.sqrt(300))
        fixed = orthogonal_features(10, 6, generator=seeded(), norms="sqrt_d", dtype=DOUBLE)
        assert fixed.norm(dim=-1).numpy() == pytest.approx(math.sqrt(6), abs=1e-12)

    @pytest.mark.parametrize("haar", [True, False])
    def test_only_with_the_signs_are_the_directions_uniform(self, haar):
        """For fixed unit vectors a, b of a Haar matrix Q, (aᵀQb)² is Beta(1/2, (d-1)/2) and the sign is even.

        And its trace has the moments 0 and 1 (Diaconis and Shahshahani), for d > 2.
        """
        d, count = 8, 3000
        beta = scipy.stats.beta(0.5, (d - 1) / 2)
        w = torch.nn.functional.normalize(block_draws(count, d, d, haar=haar), dim=-1)
        p_values = []
        for seed in range(4):
            a, b = torch.nn.functional.normalize(normal(2, d, seed=seed), dim=-1)
            if seed == 0:
                a = b = torch.ones(d, dtype=DOUBLE) / d**0.5
            x = torch.einsum("i,nij,j->n", a, w, b)
            signed = (1 + x.sign() * torch.tensor(beta.cdf(x.square().numpy()))) / 2  # uniform on [0, 1]
            p_values.append(scipy.stats.kstest(signed, "uniform").pvalue)
        trace = w.diagonal(dim1=-2, dim2=-1).sum(-1)
        fits = abs(trace.mean()) < SIGMAS / math.sqrt(count)
        fits &= abs(trace.square().mean() - 1) < SIGMAS * math.sqrt(2 / count)
        assert (min(p_values) > 1e-4) == haar
        assert bool(fits) == haar

    def test_seeds_types_and_the_global_state(self):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        a = orthogonal_features(9, 4, generator=seeded(3))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert a.dtype == torch.float32
        assert torch.equal(a, orthogonal_features(9, 4, generator=seeded(3), dtype=DOUBLE).float())
        assert not torch.equal(a, orthogonal_features(9, 4, generator=seeded(4)))

    def test_the_draw_is_made_on_the_cpu_whatever_the_default(self):
        with torch.device("meta"):
            w = orthogonal_features(9, 4, generator=seeded(3))
        assert torch.equal(w, orthogonal_features(9, 4, generator=seeded(3)))

    @pytest.mark.parametrize("m, d", [(0, 4), (4, 0), (-1, 4), (2.0, 4), (4, "4")])
    def test_bad_sizes(self, m, d):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            orthogonal_features(m, d)

    def test_bad_norms(self):
        with pytest.raises(ValueError, match='"chi" or "sqrt_d"'):
            orthogonal_features(4, 4, norms="ones")


class TestFeatures:
    @every_kind
    def test_inner_products_are_the_kernel_on_average(self, features):
        """By quadrature, not by chance: in one dimension every direction is a node of it."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        w, share = torch.tensor(nodes)[:, None], torch.tensor(weights / weights.sum())
        for q, k in [(0.0, 0.0), (1.0, 0.5), (-1.2, 0.9), (2.0, -1.0)]:
            phi, psi = (features(torch.tensor([[x]], dtype=DOUBLE), w)[0] for x in (q, k))
            per_direction = (phi * psi).reshape(-1, len(nodes)).sum(0) * len(nodes)
            assert float(per_direction @ share) == pytest.approx(math.exp(q * k), rel=1e-9)

    def test_positive_features_written_out(self):
        x, w = normal(2, 3, 4), normal(5, 4, seed=1)
        phi = positive_features(x, w)
        for i in np.ndindex(2, 3):
            for r in range(5):
                expected = math.exp(float(w[r] @ x[i]) - float(x[i] @ x[i]) / 2) / math.sqrt(5)
                assert float(phi[i][r]) == pytest.approx(expected, rel=1e-12)

    @every_kind
    def test_shift_scales_all_features_alike(self, features):
        x, w = normal(6, 4), normal(5, 4, seed=1)
        assert torch.allclose(features(x, w, shift=1.5), features(x, w) * math.exp(1.5), rtol=1e-12)
        ratio = features(x, w, shift=None) / features(x, w)
        assert torch.allclose(ratio, ratio[:, :1], rtol=1e-10)
        assert (ratio > 0).all()

    @every_kind
    def test_a_shift_for_each_token(self, features):
        x, w, shift = normal(6, 4), normal(5, 4, seed=1), normal(6, 1, seed=2)
        assert torch.allclose(features(x, w, shift=shift), features(x, w) * shift.exp(), rtol=1e-12)

    def test_without_a_common_factor_the_largest_positive_feature_is_one(self):
        x = 100 * normal(6, 4, dtype=torch.float32)
        phi = positive_features(x, normal(5, 4, seed=1), shift=None)
        assert torch.equal(phi.amax(-1), torch.ones(6))

    def test_keys_cannot_overflow(self):
        """The logarithm of a key's feature is at most ‖w‖²/2, reached where the key is w."""
        w = orthogonal_features(64, 64, generator=seeded())
        keys = torch.cat([w, 3 * w, 1e3 * w, normal(64, 64, dtype=torch.float32) * 1e4])
        phi = positive_features(keys, w) * 8
        assert phi.isfinite().all()
        assert (phi.log() <= w.square().sum(-1) / 2 * (1 + 1e-5)).all()

    @every_kind
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_types(self, features, dtype):
        x, w = 0.5 * normal(7, 8, dtype=dtype), normal(6, 8, seed=1, dtype=torch.float32)
        phi, exact = features(x, w), features(x.double(), w.double())
        assert phi.dtype == dtype
        # Rounded once, at the end; before that in float32.
        assert ((phi - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5 * (dtype != DOUBLE)).all()

    @every_kind
    def test_no_tokens(self, features):
        assert features(torch.zeros(0, 4), torch.zeros(3, 4)).shape[0] == 0

    def test_bad_input(self):
        with pytest.raises(TypeError, match="floating-point"):
            positive_features(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4))
        with pytest.raises(ValueError, match="projection"):
            positive_features(torch.zeros(3, 4), torch.zeros(2, 5))
        with pytest.raises(ValueError, match="projection"):
            trig_features(torch.zeros(3, 4), torch.zeros(4))


class TestVariance:
    @pytest.mark.parametrize("radius, cosine", [(0.5, 0.3), (1.0, 0.0), (1.0, -0.9), (1.0, 0.9), (1.3, -0.4)])
    def test_closed_forms_equal_quadrature(self, radius, cosine):
        q, k = pair(radius, cosine)
        s, delta = float((q + k).square().sum()), float((q - k).square().sum())
        functions = {
            "positive": (np.exp, s),
            "hyperbolic": (np.cosh, s),
            "trig": (np.cos, delta),
        }
        for kind, (function, variance) in functions.items():
            first = gauss_hermite(function, variance)
            second = gauss_hermite(lambda x, f=function: f(x) ** 2, variance)
            expected = (second - first**2) / first**2 / 5
            assert float(relative_variance(q, k, 5, kind)) == pytest.approx(expected, rel=1e-8)

    @every_kind
    def test_the_features_have_that_variance(self, features):
        """A confidence band from the number of draws and the exact fourth moment."""
        kind = features.__name__.split("_")[0]
        q, k = pair(0.6, -0.2)
        count = 100_000
        w = normal(count, 16, seed=2)
        phi, psi = (features(x, w) for x in (q, k))
        draws = (phi * psi).reshape(-1, count).sum(0) * count / math.exp(float(q @ k))
        deviation = draws.numpy() - 1
        one = float(relative_variance(q, k, 1, kind))
        assert abs(deviation.mean()) < SIGMAS * math.sqrt(one / count)
        # The sample's own fourth moment is good enough: the norms are small here.
        band = SIGMAS * math.sqrt(((deviation**4).mean() - one**2) / count)
        assert abs((deviation**2).mean() - one) < band
        assert band < 0.1 * one

    @pytest.mark.parametrize("m, d", [(2, 2), (8, 8), (5, 8), (20, 8), (1, 8), (7, 1), (9, 3)])
    def test_orthogonal_directions(self, m, d):
        """The mean of m estimates, over many draws of all m: the bands come from the draws' fourth moments."""
        q, k = pair(0.5, 0.2, d) if d > 1 else (torch.tensor([0.5], dtype=DOUBLE), torch.tensor([0.3], dtype=DOUBLE))
        count = 6000
        w = block_draws(count, m, d, seed=5)
        phi, psi = (positive_features(x, w.reshape(-1, d)).reshape(count, m) * count**0.5 for x in (q, k))
        deviation = ((phi * psi).sum(-1) / math.exp(float(q @ k)) - 1).numpy()
        expected = float(relative_variance(q, k, m, "orthogonal"))
        assert abs(deviation.mean()) < SIGMAS * math.sqrt(expected / count)
        assert abs((deviation**2).mean() - expected) < SIGMAS * (deviation**2).std() / math.sqrt(count)

    def test_orthogonal_gain_is_far_outside_of_chance(self):
        """The test above could not tell orthogonal from independent directions where the gain is small; here it can."""
        q, k = pair(0.5, 0.2, 16)
        count = 10_000
        # One call for all: m = 16 count directions of 16 coordinates are `count` blocks.
        w = orthogonal_features(16 * count, 16, generator=seeded(6), dtype=DOUBLE)
        phi, psi = (positive_features(x, w).reshape(-1, 16) * count**0.5 for x in (q, k))
        squares = ((phi * psi).sum(-1) / math.exp(float(q @ k)) - 1).square()
        band = SIGMAS * squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - relative_variance(q, k, 16, "orthogonal")) < band
        assert abs(squares.mean() - relative_variance(q, k, 16, "positive")) > 2 * band

    @given(st.floats(0, 3), st.floats(-1, 1), st.integers(1, 40), st.integers(2, 40))
    def test_orthogonal_equals_kummer_and_respects_the_bound(self, radius, cosine, m, d):
        q, k = pair(radius, cosine, d)
        s = float((q + k).square().sum())
        ours = float(relative_variance(q, k, m, "orthogonal"))
        blocks = [d] * (m // d) + [m % d]
        pairs = sum(b * (b - 1) for b in blocks)
        kummer = math.exp(-s) * float(scipy.special.hyp1f1(d, d / 2, s / 2))
        assert ours == pytest.approx(math.expm1(s) / m - pairs / m**2 * (1 - kummer), rel=1e-9, abs=1e-12)
        assert ours <= float(relative_variance(q, k, m, "positive")) * (1 + 1e-12) + 1e-15
        if m <= d:
            assert ours <= float(relative_variance(q, k, m, "orthogonal bound")) * (1 + 1e-9) + 1e-12

    def test_the_paper_writes_them_with_the_kernel(self):
        """Lemma 2 of the paper, absolute: with SM = exp(q·k)."""
        q, k = pair(1.1, 0.35)
        s, delta, sm = (q + k).square().sum(), (q - k).square().sum(), (q @ k).exp()
        positive = s.exp() * sm**2 * (1 - (-s).exp()) / 7
        trig = s.exp() / sm**2 * (1 - (-delta).exp()) ** 2 / 14
        paper = {"positive": positive, "trig": trig, "hyperbolic": positive * (1 - (-s).exp()) / 2}
        for kind, value in paper.items():
            assert float(relative_variance(q, k, 7, kind) * sm**2) == pytest.approx(float(value), rel=1e-12)

    def test_leading_axes_and_opposite_vectors(self):
        q = normal(3, 1, 5)
        k = normal(1, 4, 5, seed=1)
        for kind in ("positive", "trig", "hyperbolic", "orthogonal", "orthogonal bound"):
            value = relative_variance(q, k, 5, kind)
            assert value.shape == (3, 4)
            assert float(value[1, 2]) == pytest.approx(float(relative_variance(q[1, 0], k[0, 2], 5, kind)), rel=1e-12)
        assert relative_variance(q, -q, 5, "orthogonal").abs().max() == 0

    KINDS = ("positive", "trig", "hyperbolic", "orthogonal", "orthogonal bound")

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_pairs(self, kind):
        assert relative_variance(torch.zeros(0, 4), torch.zeros(0, 4), 3, kind).shape == (0,)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_types_are_rounded_once(self, dtype, kind):
        for length in (1e-3, 0.3, 1.0):
            q, k = (torch.full((16,), length / 4 * factor).to(dtype) for factor in (1, 0.25))
            value, exact = relative_variance(q, k, 16, kind), relative_variance(q.double(), k.double(), 16, kind)
            assert value.dtype == dtype
            # Rounded once: at most half a unit in the last place, or half the smallest number there is.
            info = torch.finfo(dtype)
            assert abs(value.double() - exact) <= info.eps / 2 * exact + info.smallest_normal * info.eps / 2

    def test_the_orthogonal_gain_stays_exact_where_it_is_small(self):
        """1 - e^-s 1F1 is s²/(2(d + 2)) to second order, against e^s - 1: the rest must not be lost to rounding."""
        x = torch.zeros(16, dtype=torch.float32)
        for length in (3e-5, 1e-4, 1e-3):
            x[0] = length
            assert float(relative_variance(x, 0 * x, 16, "orthogonal")) == pytest.approx(length**2 / 16, rel=1e-5)

    @pytest.mark.parametrize("length", [26.0, 27.0, 1e3, 1e150])
    def test_absurd_lengths_end_at_once(self, length):
        q = torch.zeros(2, 16, dtype=DOUBLE)
        q[:, 0] = torch.tensor([length, 7.0], dtype=DOUBLE)
        value = relative_variance(q, 0 * q, 16, "orthogonal")
        positive = relative_variance(q, 0 * q, 16)
        assert torch.equal(value.isinf(), torch.tensor([length > 26.6, False]))
        assert value[1] == pytest.approx(float(positive[1]), rel=1e-12)
        assert length > 26.6 or value[0] == pytest.approx(float(positive[0]), rel=1e-12)

    @pytest.mark.parametrize("s", [22.0, 30.0, 45.0, 49.0, 51.0, 60.0])
    def test_kummer_where_the_series_is_cut(self, s):
        q = torch.zeros(16, dtype=DOUBLE)
        q[0] = math.sqrt(s)
        kummer = math.exp(-s) * float(scipy.special.hyp1f1(16, 8, s / 2))
        expected = math.expm1(s) / 16 - 15 / 16 * (1 - kummer)
        assert float(relative_variance(q, 0 * q, 16, "orthogonal")) == pytest.approx(expected, rel=1e-12)

    def test_bad_input(self):
        x = torch.ones(4)
        with pytest.raises(ValueError, match="whole number"):
            relative_variance(x, x, 0)
        with pytest.raises(ValueError, match="make them equal"):
            relative_variance(x, x[:1], 2)
        with pytest.raises(ValueError, match="m <= d"):
            relative_variance(x, x, 5, "orthogonal bound")
        with pytest.raises(ValueError, match='"trig"'):
            relative_variance(x, x, 5, "cosine")


class TestAttention:
    @every_kind
    @given(
        n=st.integers(1, 9),
        d=st.integers(1, 5),
        m=st.integers(1, 7),
        chunk=st.integers(1, 10),
        causal=st.booleans(),
        scale=st.sampled_from([None, 0.3, 1.0]),
        seed=st.integers(0, 99),
    )
    def test_equals_the_definition(self, features, n, d, m, chunk, causal, scale, seed):
        q, k = 0.3 * normal(2, 3, n, d, seed=seed), 0.3 * normal(3, n, d, seed=seed + 1)
        v, w = normal(2, 1, n, 4, seed=seed + 2), normal(m, d, seed=seed + 3)
        ours, _ = favor_attention(q, k, v, w, features=features, causal=causal, scale=scale, chunk_size=chunk)
        expected = attention_by_definition(q, k, v, w, features, scale or d**-0.5, causal)
        assert ours.shape == (2, 3, n, 4)
        # Trigonometric weights may nearly cancel: the error of 1/sum grows with the square of 1/sum.
        assert (ours - expected).abs().max() < 1e-11 * (1 + expected.abs().max() ** 2)

    @every_kind
    def test_more_and_more_features_give_softmax(self, features):
        q, k, v = (0.5 * normal(20, 4, seed=i) for i in range(3))
        exact, errors = softmax_attention(q, k, v), []
        for m in (50, 5000):
            ws = [orthogonal_features(m, 4, generator=seeded(i), dtype=DOUBLE) for i in range(8)]
            estimates = torch.stack([favor_attention(q, k, v, w, features=features)[0] for w in ws])
            errors.append(float((estimates - exact).square().mean().sqrt()))
        assert errors[1] < 0.02 and 4 < errors[0] / errors[1] < 25  # around √100

    @pytest.mark.parametrize("center", [False, True])
    @every_kind
    def test_no_leak_to_the_last_bit(self, features, center):
        q, k, v = (normal(2, 50, 8, seed=i, dtype=torch.float32) for i in range(3))
        w = orthogonal_features(32, 8, generator=seeded(4))
        options = {"features": features, "chunk_size": 16, "shift": 3.0}
        if center:
            options["center"] = (normal(2, 1, 8, seed=5), normal(2, 1, 8, seed=6))
        before, _ = favor_attention(q, k, v, w, **options)
        for position in (0, 1, 15, 16, 33, 49):
            for factor in (-1.0, 0.0, 4.0):
                changed = k.clone()
                changed[:, position] *= factor
                after, _ = favor_attention(q, changed, v, w, **options)
                assert torch.equal(after[:, :position], before[:, :position])
                assert not torch.equal(after[:, position:], before[:, position:]) or factor == 1

    def test_a_key_that_is_absurdly_long_harms_nobody(self):
        q, k, v = (normal(30, 8, seed=i, dtype=torch.float32) for i in range(3))
        w = orthogonal_features(32, 8, generator=seeded(4))
        before, _ = favor_attention(q, k, v, w)
        k[20] *= 1e6
        after, _ = favor_attention(q, k, v, w)
        assert torch.equal(before[:20], after[:20])
        assert after.isfinite().all()

    def test_the_shift_cancels_and_prevents_underflow(self):
        q, k, v = (normal(30, 8, seed=i, dtype=torch.float32) for i in range(3))
        w = orthogonal_features(32, 8, generator=seeded(4))
        assert torch.allclose(favor_attention(q, k, v, w)[0], favor_attention(q, k, v, w, shift=5.0)[0], atol=1e-5)
        for center in (None, (k[0], k[1])):
            plain, raised = (favor_attention(q, k, v, w, shift=x, center=center)[1] for x in (0.0, 5.0))
            assert torch.allclose(raised.z, plain.z * math.exp(5), rtol=1e-5)
        long = k / k.norm(dim=-1, keepdim=True) * 32  # ‖k‖²/2/√8 = 181: exp(-181) is zero in float32
        assert favor_attention(q, long, v, w)[0].isnan().any()
        assert favor_attention(q, long, v, w, shift=150.0)[0].isfinite().all()

    def test_one_long_key_at_the_start_is_enough_to_underflow(self):
        """The first output sees no other key. A shift that is too large overflows at the others instead."""
        q, k, v = (normal(30, 8, seed=i, dtype=torch.float32) for i in range(3))
        w = orthogonal_features(32, 8, generator=seeded(4))
        k[0] *= 28 / k[0].norm()
        assert favor_attention(q, k, v, w)[0].isnan().any(-1).nonzero().flatten().tolist() == [0]
        for shift in (50.0, 70.0):
            out = favor_attention(q, k, v, w, shift=shift)[0]
            assert out.isfinite().all() and torch.allclose(out[0], v[0], rtol=1e-5)
        assert not favor_attention(q, k, v, w, shift=100.0)[0].isfinite().all()

    def test_trig_features_need_a_negative_shift_for_long_keys(self):
        q, k, v = (normal(30, 8, seed=i, dtype=torch.float32) for i in range(3))
        w = orthogonal_features(32, 8, generator=seeded(4))
        long = k / k.norm(dim=-1, keepdim=True) * 23  # ‖k‖²/√8 = 187, and half of it is above 88
        assert not favor_attention(q, long, v, w, features=trig_features)[0].isfinite().all()
        out, exact = (favor_attention(*(x.to(t) for x in (q, long, v, w)), features=trig_features, shift=-50.0)[0]
                      for t in (torch.float32, DOUBLE))  # fmt: skip
        assert out.isfinite().all()
        assert ((out - exact).abs().amax(-1) < 1e-3 * (1 + exact.abs().amax(-1) ** 2)).double().mean() > 0.9

    def test_eps_is_added_to_the_sum_of_the_weights(self):
        q, k, v = (normal(9, 4, seed=i) for i in range(3))
        w = normal(6, 4, seed=3)
        phi, psi = positive_features(q / 4**0.25, w, shift=None), positive_features(k / 4**0.25, w)
        weights = (phi @ psi.mT).tril()
        expected = weights @ v / (weights.sum(-1, keepdim=True) + 0.7)
        assert torch.allclose(favor_attention(q, k, v, w, eps=0.7)[0], expected, atol=1e-12)

    @given(st.integers(0, 50), st.booleans(), st.sampled_from([None, 0.3, 1.0]))
    def test_centering_changes_the_estimate_and_not_what_is_estimated(self, seed, causal, scale):
        """Independent of chance: what the features estimate is evaluated with the kernel itself in their place."""
        q, k, v = (normal(2, 6, 3, seed=seed + i) for i in range(3))
        a, c = normal(2, 1, 3, seed=seed + 3), normal(2, 1, 3, seed=seed + 4)
        factor = 3**-0.5 if scale is None else scale
        log = factor * ((q - a) @ (k - c).mT + (k * a).sum(-1)[:, None])
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else torch.zeros(6, 6, dtype=torch.bool)
        weights = log.masked_fill(mask, -math.inf).softmax(-1)
        assert torch.allclose(weights @ v, softmax_attention(q, k, v, causal=causal, scale=scale), atol=1e-10)
        w = normal(7, 3, seed=seed + 5)
        phi, psi = (positive_features(x * factor**0.5, w) for x in (q - a, k - c))
        psi = psi * (factor * (k * a).sum(-1, keepdim=True)).exp()
        estimated = phi @ psi.mT
        estimated = estimated.tril() if causal else estimated
        ours, _ = favor_attention(q, k, v, w, scale=scale, center=(a, c), causal=causal, chunk_size=4)
        assert torch.allclose(ours, estimated / estimated.sum(-1, keepdim=True) @ v, atol=1e-9)

    @pytest.mark.parametrize("factor", [1.0, 30.0, 100.0, 1e4])
    @pytest.mark.parametrize("features", [positive_features, hyperbolic_features])
    def test_a_long_key_along_the_center_does_no_harm(self, features, factor):
        """Its weight exp(a·k) overflows and its features underflow; their product does not."""
        q, k, v = (normal(30, 8, seed=i) for i in range(3))
        a = torch.ones(8, dtype=DOUBLE)
        k[20] = factor * a / 8**0.5
        w = orthogonal_features(32, 8, generator=seeded(4), dtype=DOUBLE)
        exact, _ = favor_attention(q, k, v, w, features=features, center=(a, 0.5 * a))
        ours, _ = favor_attention(*(x.float() for x in (q, k, v, w)), features=features, center=(a, 0.5 * a))
        assert exact.isfinite().all()
        assert torch.allclose(ours.double(), exact, atol=1e-4)

    def test_centered_estimates_tend_to_softmax_for_any_centers(self):
        q, k, v = 0.5 * normal(20, 4, seed=1), 0.5 * normal(20, 4, seed=2), normal(20, 4, seed=3)
        w = orthogonal_features(60_000, 4, generator=seeded(5), dtype=DOUBLE)
        out, _ = favor_attention(q, k, v, w, center=(0.5 * normal(4, seed=8), 0.5 * normal(4, seed=9)))
        assert (out - softmax_attention(q, k, v)).abs().max() < 0.03

    @pytest.mark.parametrize("shape_a, shape_c", [((2, 1, 1, 4), (4,)), ((2, 3, 1, 4), (3, 1, 4)), ((4,), (1, 4))])
    @pytest.mark.parametrize("causal", [False, True])
    def test_centers_with_leading_axes_of_their_own(self, shape_a, shape_c, causal):
        q, k, v, w = normal(2, 3, 6, 4, seed=1), normal(3, 6, 4, seed=2), normal(2, 1, 6, 4, seed=3), normal(8, 4)
        a, c = normal(*shape_a, seed=4), normal(*shape_c, seed=5)
        ours, _ = favor_attention(q, k, v, w, center=(a, c), causal=causal)
        for i in np.ndindex(2, 3):
            one = [x.expand(2, 3, *x.shape[-2:])[i] for x in (q, k, v)]
            middle = [(x if x.ndim > 1 else x[None]).expand(2, 3, 1, 4)[i] for x in (a, c)]
            expected, _ = favor_attention(*one, w, center=tuple(middle), causal=causal)
            assert torch.allclose(ours[i], expected, atol=1e-12)

    @given(st.integers(1, 11), st.integers(1, 5), st.booleans())
    def test_a_sequence_may_come_in_pieces(self, cut, chunk, center):
        q, k, v = (normal(2, 12, 4, seed=i) for i in range(3))
        w = normal(5, 4, seed=3)
        options = {"center": (normal(4, seed=8), normal(4, seed=9)) if center else None, "chunk_size": chunk}
        whole, end = favor_attention(q, k, v, w, **options)
        first, state = favor_attention(*(x[:, :cut] for x in (q, k, v)), w, **options)
        second, last = favor_attention(*(x[:, cut:] for x in (q, k, v)), w, initial_state=state, **options)
        assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-10)
        assert torch.allclose(last.s, end.s) and torch.allclose(last.z, end.z)
        assert end.s.shape == (2, 5, 4) and end.z.shape == (2, 5)

    @pytest.mark.parametrize("eps", [0.0, 0.1])
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    @every_kind
    def test_gradients(self, features, causal, center, eps):
        q, k, v = (0.3 * normal(1, 5, 3, seed=i).requires_grad_() for i in range(3))
        middle = (0.1 * normal(3, seed=8), 0.1 * normal(3, seed=9)) if center else None
        w = normal(6, 3, seed=3)

        def attend(q, k, v):
            options = {"features": features, "causal": causal, "center": middle, "eps": eps}
            return favor_attention(q, k, v, w, chunk_size=2, **options)[0]

        assert torch.autograd.gradcheck(attend, tuple(x.detach().requires_grad_() for x in (q, k, v)))

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_types(self, dtype, center):
        q, k, v = (normal(2, 40, 8, seed=i, dtype=dtype) for i in range(3))
        w = orthogonal_features(16, 8, generator=seeded(1))
        middle = (normal(8, seed=8), normal(8, seed=9)) if center else None
        out, state = favor_attention(q, k, v, w, center=middle)
        exact, _ = favor_attention(q.double(), k.double(), v.double(), w.double(), center=middle)
        assert out.dtype == dtype and state.s.dtype == torch.float32
        assert (out.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps

    @every_kind
    def test_the_weights_have_at_most_the_rank_of_the_features(self, features):
        q, k, one = normal(24, 6), normal(24, 6, seed=1), torch.eye(24, dtype=DOUBLE)
        w = normal(5, 6, seed=2)
        numbers = features(q, w).shape[-1]
        out, _ = favor_attention(q, k, one, w, features=features, causal=False)
        assert torch.linalg.matrix_rank(out) == numbers
        assert torch.linalg.matrix_rank(softmax_attention(q, k, one, causal=False)) == 24
        # The mask breaks it: a triangle with a diagonal of positive numbers has full rank. Blocks below it keep it.
        causal, _ = favor_attention(q, k, one, w, features=features)
        assert torch.linalg.matrix_rank(causal[12:, :12]) <= numbers < 12
        if features is not trig_features:
            assert (causal.diagonal() > 0).all()

    def test_trig_weights_can_be_negative_and_positive_ones_cannot(self):
        q, k = 3 * normal(40, 8), 3 * normal(40, 8, seed=1)
        w, one = orthogonal_features(16, 8, generator=seeded(2), dtype=DOUBLE), torch.eye(40, dtype=DOUBLE)
        assert (favor_attention(q, k, one, w, features=trig_features, causal=False)[0] < 0).any()
        assert (favor_attention(q, k, one, w, causal=False)[0] >= 0).all()

    def test_bad_input(self):
        q, w = torch.ones(5, 4), torch.ones(3, 4)
        with pytest.raises(ValueError, match=r"shape \(m, d\)"):
            favor_attention(q, q, q, torch.ones(4))
        with pytest.raises(ValueError, match="projection"):
            favor_attention(q, q, q, torch.ones(3, 5))
        with pytest.raises(ValueError, match="chunk_size"):
            favor_attention(q, q, q, w, chunk_size=0)
        with pytest.raises(ValueError, match="scale must be positive"):
            favor_attention(q, q, q, w, scale=-1.0)
        with pytest.raises(ValueError, match="q must be a tensor"):
            favor_attention(torch.ones(4), q, q, w)
        with pytest.raises(TypeError, match="one type"):
            favor_attention(q, q.double(), q, w)
        with pytest.raises(ValueError, match="broadcast"):
            favor_attention(q, q, q, w, center=(torch.ones(3), torch.ones(4)))
        for center in ((torch.ones(5, 4), torch.ones(4)), (torch.ones(4), torch.ones(5, 4))):
            with pytest.raises(ValueError, match="one vector for all tokens"):
                favor_attention(q, q, q, w, center=center)
        with pytest.raises(TypeError, match="one type"):
            favor_attention(q, q.double(), q, w, center=(torch.ones(4), torch.ones(4)))
        with pytest.raises(TypeError, match="one type"):
            favor_attention(q, q, None, w, center=(torch.ones(4), torch.ones(4)))
        with pytest.raises(ValueError, match="against each other"):
            two, three = torch.ones(2, 5, 4), torch.ones(3, 5, 4)
            favor_attention(two, three, three, w, center=(torch.ones(2, 1, 4), torch.ones(4)))
        with pytest.raises(ValueError, match="state"):
            favor_attention(q, q, q, w, initial_state=favor_attention(q, q, q, torch.ones(7, 4))[1])

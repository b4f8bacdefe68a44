"""Upsampling layers as the linear maps that they are: interpolation, transposed convolution, pixel shuffle, unpooling.

Arrays have torch's layout, (batch, channels, *spatial axes). Everything here is compared with torch, whose names and
conventions are used; the equations are those of 05_upsampling. Sources: V. Dumoulin and F. Visin, "A guide to
convolution arithmetic for deep learning" (arXiv 1603.07285); W. Shi and others (arXiv 1609.05158), pixel shuffle;
A. Aitken and others (arXiv 1707.02937), ICNR; torch's ``aten/src/ATen/native/UpSample.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import floor
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Sizes = int | Sequence[int]

# The spatial axes that each mode is for; None: any number from 1 to 3.
_MODES = {
    "nearest": None,
    "nearest-exact": None,
    "area": None,
    "linear": 1,
    "bilinear": 2,
    "trilinear": 3,
    "bicubic": 2,
    "lanczos": 2,
}
_CORNERED = ("linear", "bilinear", "trilinear", "bicubic")


# --- Interpolation


def source_coordinate(
    n_in: int, n_out: int, align_corners: bool = False, scale: float | None = None
) -> NDArray[np.float64]:
    """Where each of `n_out` outputs lies among the inputs 0 … `n_in` - 1; it may lie outside. Eqs. (3) and (4).

    Parameters
    ----------
    n_in, n_out
        Numbers of pixels.
    align_corners
        True: the middles of the first and the last pixels lie on each other. False: the outer edges do.
    scale
        How many outputs an input becomes, where that is not to be ``n_out / n_in``. Without effect on aligned corners.
    """
    i = np.arange(n_out)
    if align_corners:
        return i * ((n_in - 1) / (n_out - 1)) if n_out > 1 else np.zeros(n_out)
    step = 1 / scale if scale else n_in / n_out
    return (i + 0.5) * step - 0.5


def _hat(x: Array) -> Array:
    return np.maximum(1 - np.abs(x), 0)


def cubic_kernel(x: ArrayLike, a: float = -0.75) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel, 0 beyond 2; torch takes `a` = -0.75, TensorFlow -0.5. Eq. (6)."""
    x = np.abs(np.asarray(x, dtype=float))
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: Array) -> Array:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


# With antialiasing: the kernel, and how far it reaches. As in Pillow, and so in torch, a is -0.5 here.
_WIDE = {"linear": (_hat, 1), "cubic": (lambda x: cubic_kernel(x, a=-0.5), 2), "lanczos": (_lanczos, 3)}


def interpolation_matrix(
    n_in: int,
    n_out: int,
    mode: str,
    align_corners: bool = False,
    scale: float | None = None,
    antialias: bool = False,
) -> NDArray[np.float64]:
    """Matrix W, shape (n_out, n_in), that resamples one axis; each row sums to 1. Eq. (5).

    Parameters
    ----------
    mode
        "nearest", "nearest-exact", "area", "linear", "cubic" or, with `antialias` only, "lanczos".
    align_corners, scale
        As for `source_coordinate`; for "linear" and "cubic", and the scale for both kinds of nearest as well.
    antialias
        Widens the kernel of "linear" and "cubic" to the size of an output pixel when there are fewer outputs than
        inputs. As in torch, "cubic" then has a = -0.5.
    """
    if n_in < 1 or n_out < 1:
        raise ValueError(f"sizes must be at least 1, got {n_in} inputs and {n_out} outputs")
    if scale is not None and not 0 < scale < np.inf:
        raise ValueError(f"scale must be positive, got {scale}")
    if (align_corners or antialias) and mode not in _WIDE:
        raise ValueError(f"align_corners and antialias have no meaning for {mode}: leave them out")
    if mode in ("nearest", "nearest-exact"):
        return np.eye(n_in)[_nearest(n_in, n_out, mode, scale, np.float64)]
    if mode == "area":  # the mean of all inputs that an output pixel touches
        i, j = np.arange(n_out)[:, None], np.arange(n_in)
        touched = (j >= i * n_in // n_out) & (j < -((-(i + 1) * n_in) // n_out))
        return touched / touched.sum(1, keepdims=True)
    if mode not in _WIDE:
        known = ("nearest", "nearest-exact", "area", *_WIDE)
        raise ValueError(f"the mode for one axis must be one of {', '.join(known)}, got {mode!r}")
    if n_in == n_out and (mode == "linear" or antialias):
        return np.eye(n_in)  # whatever the scale, as in torch
    if antialias:
        return _antialiased(n_in, n_out, mode, align_corners, scale)
    if mode == "lanczos":
        raise ValueError("lanczos needs antialias=True, as in torch")
    s = source_coordinate(n_in, n_out, align_corners, scale)[:, None]
    if mode == "linear":
        s = np.maximum(s, 0)
    below = np.floor(s).astype(int)
    kernel = _hat if mode == "linear" else cubic_kernel
    taps = below + (np.arange(2) if mode == "linear" else np.arange(-1, 3))
    matrix = np.zeros((n_out, n_in))
    # What lies outside is the pixel at the border; several taps may fall on it.
    np.add.at(matrix, (np.arange(n_out)[:, None], np.clip(taps, 0, n_in - 1)), kernel(s - taps))
    return matrix


def _nearest(
    n_in: int, n_out: int, mode: str, scale: float | None, dtype: Any, small: bool = False
) -> NDArray[np.int64]:
    """Which input each output takes, eqs. (1) and (2), in torch's arithmetic: a rounded step, then `dtype`, then floor.

    Where a product lies next to a whole number, the rounding decides.
    """
    step = dtype(1 / scale) if scale else dtype(n_in) / dtype(n_out)
    i, half = np.arange(n_out, dtype=dtype), dtype(0.5)
    if mode == "nearest":
        place = i * step
    elif small:
        place = (i + half) * step
    else:
        place = np.maximum((i + half) * step - half, 0) + half
    return np.minimum(np.floor(place.astype(np.float32)).astype(int), n_in - 1)


def _antialiased(n_in: int, n_out: int, mode: str, align_corners: bool, scale: float | None) -> NDArray[np.float64]:
    if align_corners:
        step = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    else:
        step = 1 / scale if scale else n_in / n_out
    stretch = max(step, 1.0)
    kernel, radius = _WIDE[mode]
    middle = (np.arange(n_out)[:, None] + 0.5) * step  # torch leaves out the shift of aligned corners here
    first = np.maximum((middle - radius * stretch + 0.5).astype(int), 0)
    last = np.minimum((middle + radius * stretch + 0.5).astype(int), n_in)
    j = np.arange(n_in)
    weights = kernel((j + 0.5 - middle) / stretch) * ((j >= first) & (j < last))
    return weights / weights.sum(1, keepdims=True)


def interpolate(
    x: ArrayLike,
    size: Sizes | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Array:
    """Resample the spatial axes, as ``torch.nn.functional.interpolate`` does; one matrix for each axis. Eq. (5).

    Parameters
    ----------
    x : array of shape (batch, channels, *spatial)
        One to three spatial axes, as `mode` asks.
    size, scale_factor
        One of the two, a number or one for each spatial axis. With a factor f the output has floor(n f) pixels.
    mode
        "nearest", "nearest-exact", "area"; "linear"; "bilinear", "bicubic", "lanczos"; "trilinear" for 1, 2, 3 axes.
    align_corners
        For the modes in the second group; see `source_coordinate`. None is False.
    recompute_scale_factor
        True: the step between outputs follows from the sizes, as if `size` had been given. None and False: it is
        1 / `scale_factor`, which differs when floor(n f) is not n f. "area" uses the sizes in any case.
    antialias
        For "bilinear" and "bicubic"; "lanczos" needs it.

    Returns
    -------
    ndarray
        Of the same dtype; other than in "nearest" modes and with integers, float64.

    Raises
    ------
    ValueError
        The arguments do not fit together; it says which.
    """
    x = np.asarray(x)
    axes = x.ndim - 2
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if axes not in ((1, 2, 3) if _MODES[mode] is None else (_MODES[mode],)):
        wanted = _MODES[mode] or "1 to 3"
        raise ValueError(f"{mode} needs an array (batch, channels, and {wanted} spatial axes), got shape {x.shape}")
    if align_corners is not None and mode not in _CORNERED and not (mode == "lanczos" and not align_corners):
        raise ValueError(f"align_corners has no meaning for {mode}: leave it out")
    if mode == "lanczos" and not antialias:
        raise ValueError("lanczos needs antialias=True, as in torch")
    if antialias and mode not in ("bilinear", "bicubic", "lanczos"):
        raise ValueError(f"antialias is for bilinear, bicubic and lanczos, not for {mode}")
    if (size is None) == (scale_factor is None):
        raise ValueError("give either size or scale_factor")
    factors: list[float | None] = [None] * axes
    if scale_factor is not None:
        factors = _for_each_axis(scale_factor, axes, "scale_factor")
        if not all(f > 0 and np.isfinite(f) for f in factors):
            raise ValueError(f"scale_factor must be positive, got {scale_factor}")
        sizes = [floor(n * float(f)) for n, f in zip(x.shape[2:], factors, strict=True)]
        if recompute_scale_factor:
            factors = [None] * axes
    else:
        if recompute_scale_factor:
            raise ValueError("recompute_scale_factor needs a scale_factor")
        sizes = _for_each_axis(size, axes, "size")
        if not all(isinstance(n, (int, np.integer)) for n in sizes):
            raise ValueError(f"size must be made of integers, got {size}")
    one_axis = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    result = x
    small = axes == 2 and sum(sizes) <= 128  # torch has another program for these: in float32, and with short cuts
    for axis, (n_out, factor) in enumerate(zip(sizes, factors, strict=True), 2):
        n_in = x.shape[axis]
        if mode.startswith("nearest"):
            if n_in < 1 or n_out < 1:
                raise ValueError(f"sizes must be at least 1, got {n_in} inputs and {n_out} outputs")
            if small and mode == "nearest" and n_out in (n_in, 2 * n_in):
                factor = None
            dtype = np.float32 if small or x.dtype != np.float64 else np.float64
            result = np.take(result, _nearest(n_in, n_out, mode, factor, dtype, small), axis)
        else:
            matrix = interpolation_matrix(n_in, n_out, one_axis, bool(align_corners), factor, antialias)
            result = np.moveaxis(np.tensordot(matrix, result, (1, axis)), 0, axis)
    return result.astype(x.dtype) if x.dtype.kind == "f" else result


def _for_each_axis(value: Any, axes: int, name: str) -> list:
    values = list(value) if np.ndim(value) else [value] * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be a number or {axes} of them, one for each spatial axis, got {value}")
    return values


# --- Transposed convolution


def conv_output_size(n: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Pixels that a convolution makes of `n`: floor((n + 2p - d(k - 1) - 1) / s) + 1."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_transpose_output_size(
    n: int, kernel: int, stride: int = 1, padding: int = 0, output_padding: int = 0, dilation: int = 1
) -> int:
    """Pixels that a transposed convolution makes of `n`. Eq. (9)."""
    return (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def conv_matrix(
    weight: ArrayLike,
    size: tuple[int, int],
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> NDArray[np.float64]:
    """Matrix C with ``conv2d(x, weight).ravel() == C @ x.ravel()`` for one image x. Eq. (7).

    Parameters
    ----------
    weight : array of shape (out channels, in channels / groups, kernel height, kernel width)
        As for ``torch.nn.functional.conv2d``.
    size
        Height and width of x.

    Returns
    -------
    ndarray of shape (out channels · out height · out width, in channels · height · width)
    """
    weight = _weight(weight, groups, 0)
    stride, padding, dilation = (
        _pair(v, n) for v, n in ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))
    )
    out, per_group, *kernel = weight.shape
    n_out = [conv_output_size(*v) for v in zip(size, kernel, stride, padding, dilation, strict=True)]
    if min(n_out) < 1:
        raise ValueError(f"a kernel of {kernel} with dilation {dilation} does not fit into {size} padded by {padding}")
    matrix = np.zeros((out, *n_out, per_group * groups, *size))
    for o in range(out):
        channels = slice(o // (out // groups) * per_group, (o // (out // groups) + 1) * per_group)
        for y, x, kh, kw in product(*map(range, (*n_out, *kernel))):
            row, column = (
                i * s + k * d - p for i, s, k, d, p in zip((y, x), stride, (kh, kw), dilation, padding, strict=True)
            )
            if 0 <= row < size[0] and 0 <= column < size[1]:
                matrix[o, y, x, channels, row, column] = weight[o, :, kh, kw]
    return matrix.reshape(out * n_out[0] * n_out[1], -1)


def conv_transpose2d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Array:
    """Transposed convolution, as ``torch.nn.functional.conv_transpose2d``: each input stamps the kernel. Eq. (8).

    Parameters
    ----------
    x : array of shape (batch, in channels, height, width)
    weight : array of shape (in channels, out channels / groups, kernel height, kernel width)
    bias : array of shape (out channels,), optional
    stride, padding, output_padding, dilation
        Numbers, or pairs for height and width. `output_padding` must be smaller than stride or dilation.

    Returns
    -------
    ndarray of shape (batch, out channels, *sizes as `conv_transpose_output_size` gives)
    """
    x, weight = np.asarray(x), _weight(weight, groups, 0)
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, extra, dilation = (
        _pair(v, n) for v, n in zip((stride, padding, output_padding, dilation), names, strict=True)
    )
    channels, per_group, *kernel = weight.shape
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (batch, {channels}, height, width) to fit the weight, got {x.shape}")
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding {extra} must be smaller than stride {stride} or dilation {dilation}")
    batch, _, *n = x.shape
    sizes = [conv_transpose_output_size(*v) for v in zip(n, kernel, stride, padding, extra, dilation, strict=True)]
    if min(sizes) < 1:
        raise ValueError(f"padding {padding} leaves nothing of the output: it would have size {sizes}")
    canvas = np.zeros((batch, groups, per_group, *(s + 2 * p for s, p in zip(sizes, padding, strict=True))))
    grouped = x.reshape(batch, groups, channels // groups, *n)
    kernels = weight.reshape(groups, channels // groups, per_group, *kernel)
    for kh, kw in product(*map(range, kernel)):
        # Position (kh, kw) of all stamps at once: every stride-th pixel of the canvas.
        rows, columns = (
            slice(k * d, k * d + (m - 1) * s + 1, s) for k, d, m, s in zip((kh, kw), dilation, n, stride, strict=True)
        )
        canvas[..., rows, columns] += np.einsum("bgihw,gio->bgohw", grouped, kernels[..., kh, kw])
    result = canvas.reshape(batch, groups * per_group, *canvas.shape[3:])
    result = result[..., padding[0] : padding[0] + sizes[0], padding[1] : padding[1] + sizes[1]]
    if bias is not None:
        bias = np.asarray(bias)
        if bias.shape != (groups * per_group,):
            raise ValueError(f"bias must have shape ({groups * per_group},), got {bias.shape}")
        result = result + bias[:, None, None]
    return result.astype(x.dtype) if x.dtype.kind == "f" else result


def overlap_counts(n: int, kernel: int, stride: int, dilation: int = 1) -> NDArray[np.int64]:
    """How many of `n` inputs reach each output of a transposed convolution, along one axis: (10) with all weights 1."""
    if min(n, kernel, stride, dilation) < 1:
        raise ValueError(f"sizes must be at least 1, got n={n}, kernel={kernel}, stride={stride}, dilation={dilation}")
    counts = np.zeros(conv_transpose_output_size(n, kernel, stride, dilation=dilation), int)
    for i in range(n):
        counts[i * stride : i * stride + dilation * (kernel - 1) + 1 : dilation] += 1
    return counts


def _weight(weight: ArrayLike, groups: int, axis: int) -> Array:
    weight = np.asarray(weight)
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight must have 4 axes and not be empty, got shape {weight.shape}")
    if groups < 1 or weight.shape[axis] % groups:
        raise ValueError(f"{weight.shape[axis]} channels cannot be divided into {groups} groups")
    return weight


def _pair(value: Sizes, name: str) -> tuple[int, int]:
    pair = tuple(value) if np.ndim(value) else (value, value)
    least = 0 if "padding" in name else 1
    if len(pair) != 2 or not all(isinstance(v, (int, np.integer)) and v >= least for v in pair):
        raise ValueError(f"{name} must be an integer of at least {least} or a pair of them, got {value}")
    return pair


# --- Pixel shuffle


def pixel_shuffle(x: ArrayLike, r: int) -> Array:
    """Move channels into space: (…, C r², H, W) becomes (…, C, H r, W r). Eq. (12)."""
    x = np.asarray(x)
    if x.ndim < 3 or r < 1 or x.shape[-3] % r**2:
        raise ValueError(
            f"pixel_shuffle by {r} needs (…, channels divisible by {r}² = {r * r}, height, width), got {x.shape}"
        )
    *batch, c, h, w = x.shape
    x = x.reshape(*batch, c // r**2, r, r, h, w)
    return np.moveaxis(x, (-4, -3), (-3, -1)).reshape(*batch, c // r**2, h * r, w * r)


def pixel_unshuffle(x: ArrayLike, r: int) -> Array:
    """Undo `pixel_shuffle`: (…, C, H r, W r) becomes (…, C r², H, W)."""
    x = np.asarray(x)
    if x.ndim < 3 or r < 1 or x.shape[-2] % r or x.shape[-1] % r:
        raise ValueError(
            f"pixel_unshuffle by {r} needs (…, channels, height and width divisible by {r}), got {x.shape}"
        )
    *batch, c, h, w = x.shape
    x = x.reshape(*batch, c, h // r, r, w // r, r)
    return np.moveaxis(x, (-3, -1), (-4, -3)).reshape(*batch, c * r**2, h // r, w // r)


def subpixel_as_conv_transpose(weight: ArrayLike, r: int) -> Array:
    """Kernel of the transposed convolution, stride r, that equals a convolution followed by `pixel_shuffle`. Eq. (13).

    Parameters
    ----------
    weight : array of shape (C r², in channels, k, k)
        Of ``conv2d`` with stride 1, no dilation and padding p.

    Returns
    -------
    ndarray of shape (in channels, C, k r, k r)
        For ``conv_transpose2d`` with stride r and padding r (k - 1 - p).
    """
    weight = np.flip(_weight(weight, 1, 0), (2, 3))  # a transposed convolution stamps, a convolution slides: mirrored
    return np.ascontiguousarray(pixel_shuffle(np.swapaxes(weight, 0, 1), r))


@torch.no_grad()
def icnr_(
    weight: torch.Tensor, r: int, initialize: Callable[[torch.Tensor], Any] = torch.nn.init.kaiming_normal_
) -> torch.Tensor:
    """Fill the weight of a convolution before ``pixel_shuffle`` so that it starts as nearest upsampling. Eq. (14).

    Its bias has to be equal within each block of r² channels, too: zero it, or leave it out.

    Parameters
    ----------
    weight : tensor of shape (C r², in channels, *kernel)
        Changed in place and returned.
    r
        Upscaling factor of the shuffle.
    initialize
        Fills a tensor of shape (C, in channels, *kernel) in place.
    """
    if weight.ndim < 3 or r < 1 or weight.shape[0] % r**2:
        raise ValueError(
            f"icnr_ needs a weight with out channels divisible by {r}² = {r * r}, got {tuple(weight.shape)}"
        )
    small = torch.empty((weight.shape[0] // r**2, *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
    initialize(small)
    return weight.copy_(small.repeat_interleave(r**2, dim=0))


# --- Unpooling


def max_pool(x: ArrayLike, kernel_size: Sizes, stride: Sizes | None = None) -> tuple[Array, NDArray[np.int64]]:
    """Largest value of each window and where it was, as ``max_pool2d(…, return_indices=True)``; ties: the first.

    Returns
    -------
    values, indices : ndarray of shape (batch, channels, *pooled size)
        An index counts through height · width, row by row.
    """
    x = np.asarray(x)
    kernel = _pair(kernel_size, "kernel_size")
    stride = kernel if stride is None else _pair(stride, "stride")
    if x.ndim != 4 or x.shape[2] < kernel[0] or x.shape[3] < kernel[1]:
        raise ValueError(
            f"x must have shape (batch, channels, height, width) and hold a window of {kernel}, got {x.shape}"
        )
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, (2, 3))[:, :, :: stride[0], :: stride[1]]
    flat = windows.reshape(*windows.shape[:4], -1)
    where = flat.argmax(-1)
    rows = np.arange(windows.shape[2])[:, None] * stride[0] + where // kernel[1]
    columns = np.arange(windows.shape[3]) * stride[1] + where % kernel[1]
    return np.take_along_axis(flat, where[..., None], -1)[..., 0], rows * x.shape[3] + columns


def max_unpool(
    x: ArrayLike,
    indices: ArrayLike,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    output_size: Sequence[int] | None = None,
) -> Array:
    """Put each value back where it was, zeros elsewhere, as ``torch.nn.functional.max_unpool2d``. Eq. (15).

    Parameters
    ----------
    x, indices : arrays of shape (batch, channels, height, width)
        As `max_pool` gives them. Where windows overlap an index may occur twice; then the last value counts.
    output_size
        Height and width, where the pooling left some pixels over; (n - 1) stride + kernel if not given.
    """
    x, indices = np.asarray(x), np.asarray(indices)
    kernel = _pair(kernel_size, "kernel_size")
    stride = kernel if stride is None else _pair(stride, "stride")
    if x.ndim != 4 or x.shape != indices.shape:
        raise ValueError(
            f"x and indices must have one shape (batch, channels, height, width), got {x.shape} and {indices.shape}"
        )
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    usual = tuple((n - 1) * s + k for n, s, k in zip(x.shape[2:], stride, kernel, strict=True))
    height, width = usual if output_size is None else _for_each_axis(output_size, 2, "output_size")
    if not all(u - s < size < u + s for u, s, size in zip(usual, stride, (height, width), strict=True)):
        raise ValueError(f"output_size must lie within less than a stride {stride} of {usual}, got {(height, width)}")
    bad = (indices < 0) | (indices >= height * width)
    if bad.any():
        raise ValueError(f"index {indices[bad][0]} lies outside of the output of {height} × {width} pixels")
    result = np.zeros((*x.shape[:2], height * width), x.dtype)
    np.put_along_axis(result, indices.reshape(*x.shape[:2], -1), x.reshape(*x.shape[:2], -1), -1)
    return result.reshape(*x.shape[:2], height, width)

"""Attention that costs less than n²: sparse patterns, hashing, low rank, kernels, and softmax in one pass.

Tensors have torch's layout, (…, tokens, features), and any floating dtype; float16 and bfloat16 are computed in
float32 and only the result is rounded, as a product q·k may exceed what float16 holds. A *pattern* is a function
``allowed(i, j)`` of two integer tensors, query and key positions, that tells elementwise whether query i may
attend to key j; like the ``mask_mod`` of torch's FlexAttention it never needs an n × n table. A query that may
attend nowhere gets zeros, as in ``torch.nn.functional.scaled_dot_product_attention``. The equations are those of
07_efficient_attention. Sources: R. Child and others (arXiv 1904.10509), N. Kitaev and others (2001.04451), S. Wang
and others (2006.04768), Y. Xiong and others (2102.03902), Z. Qin and others (2202.08791), T. Dao and others
(2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Pattern = Callable[[Tensor, Tensor], Tensor]


# --- Cost


class Cost(NamedTuple):
    """Multiplications of one Transformer layer, for one sequence."""

    projections: int  # queries, keys, values and the output: linear in n
    scores: int  # QKᵀ, and the weights times the values: quadratic in n
    feed_forward: int


def multiplications(n: int, heads: int, head_dim: int) -> Cost:
    """Count the multiplications of a layer of width heads · head_dim on `n` tokens. Eqs. (1) and (2).

    The feed-forward part widens by 4. Biases, softmax, normalisation and activations are not counted.
    """
    for name, value in (("n", n), ("heads", heads), ("head_dim", head_dim)):
        _require_positive(name, value)
    width = heads * head_dim
    return Cost(4 * n * width**2, 2 * n**2 * width, 8 * n * width**2)


# --- Patterns


def local(width: int, causal: bool = True) -> Pattern:
    """Window: keys at most `width` away, and not later than the query if `causal`."""
    _require_positive("width", width)
    return lambda i, j: ((j <= i) & (i - j <= width)) if causal else ((i - j).abs() <= width)


def atrous(step: int, causal: bool = True) -> Pattern:
    """Keys at multiples of `step` away."""
    _require_positive("step", step)
    return lambda i, j: ((i - j) % step == 0) & ((j <= i) | (not causal))


def strided(step: int) -> tuple[Pattern, Pattern]:
    """Child's *strided* pair: the last `step` keys and the query's own; every `step`-th key. Section 2."""
    return local(step), atrous(step)


def fixed(step: int, summaries: int = 1) -> tuple[Pattern, Pattern]:
    """Child's *fixed* pair: the query's own block of `step`; the last `summaries` places of every block. Causal."""
    _require_positive("step", step)
    if not 1 <= summaries <= step:
        raise ValueError(f"summaries must lie between 1 and the step {step}, got {summaries}")
    return (
        lambda i, j: (j <= i) & (i // step == j // step),
        lambda i, j: (j <= i) & (j % step >= step - summaries),
    )


def same_bucket(buckets: Tensor) -> Pattern:
    """Pairs that fall into one bucket in at least one round. `buckets` : (rounds, n), from `lsh_buckets`."""
    if buckets.ndim != 2:
        raise ValueError(f"buckets must have shape (rounds, n), got {tuple(buckets.shape)}")
    return lambda i, j: (buckets[:, i] == buckets[:, j]).any(0)


def either(*patterns: Pattern) -> Pattern:
    """Union of patterns: a pair is allowed if one of them allows it."""
    if not patterns:
        raise ValueError("either needs at least one pattern")

    def allowed(i: Tensor, j: Tensor) -> Tensor:
        result = patterns[0](i, j)
        for pattern in patterns[1:]:
            result = result | pattern(i, j)
        return result

    return allowed


def pattern_matrix(pattern: Pattern, queries: int, keys: int | None = None) -> Tensor:
    """Write a pattern as a table of booleans, shape (queries, keys); True = may attend."""
    keys = queries if keys is None else keys
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    return pattern(i, j).expand(queries, keys)


def reachable(layers: Sequence[Tensor]) -> Tensor:
    """Which inputs each output can depend on after `layers`, given in the order in which they run. Eq. (9).

    Parameters
    ----------
    layers : sequence of bool tensors of shape (n, n)
        Without the residual connection; where there is one, add the diagonal.

    Returns
    -------
    bool tensor of shape (n, n)
        Entry (i, j): is there a path from input j to output i?
    """
    if not len(layers):
        raise ValueError("reachable needs at least one layer")
    if any(layer.dtype != torch.bool or layer.shape != (len(layer), len(layer)) for layer in layers):
        raise ValueError("each layer must be a square tensor of booleans")
    reach = layers[0]
    for layer in layers[1:]:
        # Floats multiply much faster than booleans; counting paths in float32 never rounds a positive number to 0.
        reach = layer.float() @ reach.float() > 0
    return reach


# --- Exact attention: with a mask, by blocks, in one pass


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention that builds the whole score matrix. Eq. (5).

    Parameters
    ----------
    q, k, v : tensors of shape (…, queries, d), (…, keys, d), (…, keys, width)
    mask : bool tensor that broadcasts to (…, queries, keys), optional
        True = may attend. Rows without True give zeros.
    scale
        Factor of the scores; 1/√d if not given.
    """
    _require_fitting(q, k, v)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"the mask must hold booleans (True = may attend), got {mask.dtype}")
    scores = _scaled(q, scale) @ _wide(k).mT
    weights = scores.softmax(-1) if mask is None else _masked_softmax(scores, mask)
    return (weights @ _wide(v)).to(q.dtype)


def _masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    # Softmax of a row of -inf is 0/0. Gradients stay finite: both fills pass 0 back to all entries of such a row.
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0)


def block_layout(
    pattern: Pattern, queries: int, keys: int | None = None, block: int = 64, order: Tensor | None = None
) -> Tensor:
    """Which blocks hold at least one allowed pair; do it once for each pattern. Eq. (11).

    Looks at every pair, but at one row of blocks at a time.

    Parameters
    ----------
    order : permutation of the positions, shape (n,), optional
        The blocks are those of the reordered table, row and column a standing for position order[a].

    Returns
    -------
    bool tensor of shape (ceil(queries / block), ceil(keys / block))
    """
    keys = queries if keys is None else keys
    for name, value in (("queries", queries), ("keys", keys), ("block", block)):
        _require_positive(name, value)
    rows, columns = _positions(queries, keys, order)
    places = torch.arange(keys) // block
    layout = torch.zeros(-(-queries // block), -(-keys // block), dtype=torch.bool)
    for r, i in enumerate(rows.split(block)):
        touched = pattern(i[:, None], columns[None, :]).expand(len(i), keys).any(0)
        layout[r, places[touched]] = True
    return layout


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layout: Tensor | None = None,
    block: int = 64,
    order: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention that computes only the blocks of the score matrix that the pattern touches. Eq. (11).

    Parameters
    ----------
    q, k, v : tensors of shape (…, queries, d), (…, keys, d), (…, keys, width)
    pattern
        Which pairs are allowed, also within a block. Queries with none give zeros.
    layout
        From `block_layout` with the same pattern, block and order; made here if not given, which takes time n².
    order
        A permutation under which the pattern fills few blocks, such as ``buckets[0].argsort()``. Eq. (12).

    Returns
    -------
    tensor of shape (…, queries, width)
        Equal to `attention` with the pattern as mask. Given the layout, its multiplications are proportional to the
        number of blocks. Besides the result, memory is that of one row of blocks (of all of them, if a gradient is
        wanted).
    """
    _require_fitting(q, k, v)
    _require_positive("block", block)
    queries, keys = q.shape[-2], k.shape[-2]
    rows, columns = _positions(queries, keys, order)
    if layout is None:
        layout = block_layout(pattern, queries, keys, block, order)
    if layout.shape != (-(-queries // block), -(-keys // block)):
        raise ValueError(f"the layout has shape {tuple(layout.shape)}, which does not fit blocks of {block}")
    result, within = [], torch.arange(block)
    for i, touched in zip(rows.split(block), layout, strict=True):
        at = (touched.nonzero() * block + within).flatten()
        j = columns[at[at < keys]]  # the last block may be smaller
        scores = _scaled(q[..., i, :], scale) @ _wide(k[..., j, :]).mT
        result.append(_masked_softmax(scores, pattern(i[:, None], j[None, :])) @ _wide(v[..., j, :]))
    result = torch.cat(result, -2).to(q.dtype)
    return result if order is None else result[..., order.argsort(), :]


def online_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int = 64, pattern: Pattern | None = None, scale: float | None = None
) -> Tensor:
    """Exact softmax attention that sees the keys once, `block` of them at a time. Eqs. (23)–(25).

    For each query it keeps the largest score so far, the sum of exponentials and the weighted sum of values, both
    relative to that score. Memory is queries × block, as long as no gradient is wanted: torch's autograd would keep
    the pieces of all steps, which is more than the dense program keeps. (FlashAttention computes them anew instead.)
    """
    _require_fitting(q, k, v)
    _require_positive("block", block)
    queries = _scaled(q, scale)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    highest = torch.full((*lead, q.shape[-2], 1), -math.inf, dtype=queries.dtype)
    total = torch.zeros_like(highest)
    summed = torch.zeros(*lead, q.shape[-2], v.shape[-1], dtype=queries.dtype)
    i = torch.arange(q.shape[-2])[:, None]
    for start in range(0, k.shape[-2], block):
        part = slice(start, start + block)
        scores = queries @ _wide(k[..., part, :]).mT
        if pattern is not None:
            j = torch.arange(k.shape[-2])[None, part]
            scores = scores.masked_fill(~pattern(i, j), -math.inf)
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        # Before the first allowed key the maximum is -inf, and -inf - -inf would be NaN: take 0 as the reference.
        reference = higher.masked_fill(higher == -math.inf, 0)
        shrink, weights = (highest - reference).exp(), (scores - reference).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        summed = summed * shrink + weights @ _wide(v[..., part, :])
        highest = higher
    return (summed / total.masked_fill(total == 0, 1)).to(q.dtype)


# --- Hashing


def lsh_buckets(x: Tensor, buckets: int, rounds: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Hash vectors so that a small angle makes an equal bucket likely. Eq. (13); Kitaev and others, section 2.

    Parameters
    ----------
    x : tensor of shape (n, d)
        Only directions count.
    buckets
        An even number: each of ``buckets / 2`` random directions makes two.

    Returns
    -------
    int64 tensor of shape (rounds, n)
    """
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, d), got {tuple(x.shape)}")
    if buckets < 2 or buckets % 2:
        raise ValueError(f"buckets must be an even number of at least 2, got {buckets}")
    _require_positive("rounds", rounds)
    directions = torch.randn(rounds, x.shape[1], buckets // 2, generator=generator, dtype=x.dtype)
    seen = x @ directions
    return torch.cat([seen, -seen], -1).argmax(-1)


def lsh_collision(degrees: ArrayLike, buckets: int) -> NDArray[np.float64]:
    """Probability that two vectors at an angle get one bucket in one round, by quadrature. Eq. (14).

    Parameters
    ----------
    degrees
        Angles: 0, 180, or from 5 to 175, where the error is below 1e-3.
    """
    if buckets < 2 or buckets % 2:
        raise ValueError(f"buckets must be an even number of at least 2, got {buckets}")
    u = np.linspace(0, 6.5, 501)
    step, trapezoid = u[1], np.ones(len(u))
    trapezoid[[0, -1]] = 0.5

    def probability(angle: float) -> float:
        if angle in (0, 180):
            return float(angle == 0)
        if not 5 <= angle <= 175:
            raise ValueError(f"angles must be 0, 180, or between 5 and 175 degrees, got {angle}")
        rho = math.cos(math.radians(angle))
        same, opposite = (  # density of two projections, of equal and of opposite sign
            np.exp(-(u[:, None] ** 2 - 2 * r * u[:, None] * u + u**2) / (2 - 2 * rho**2))
            / (2 * math.pi * math.sqrt(1 - rho**2))
            for r in (rho, -rho)
        )
        inside = 2 * (same + opposite)  # then P(|X| < u, |Y| < v), by the trapezoidal rule along both axes
        for axis in (0, 1):
            inside = np.moveaxis(inside, axis, 0)
            steps = (inside[1:] + inside[:-1]) * (step / 2)
            inside = np.moveaxis(np.concatenate([np.zeros((1, len(u))), steps.cumsum(0)]), 0, axis)
        return buckets * step**2 * float(trapezoid @ (same * inside ** (buckets // 2 - 1)) @ trapezoid)

    return np.vectorize(probability, otypes=[float])(degrees)


# --- Low rank


def linformer_attention(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """Attention to m mixtures of the keys and values, along the sequence. Eq. (16); Wang and others, section 4.

    Parameters
    ----------
    e, f : tensors of shape (m, keys)
        Mix keys and values. Each mixture holds the future, so this cannot be causal.
    """
    _require_fitting(q, k, v)
    for name, mix in (("e", e), ("f", f)):
        if mix.ndim != 2 or mix.shape[1] != k.shape[-2] or mix.shape[0] != e.shape[0]:
            raise ValueError(f"{name} must have shape (m, {k.shape[-2]}), one m for both, got {tuple(mix.shape)}")
    mixed_k, mixed_v = _wide(e) @ _wide(k), _wide(f) @ _wide(v)
    return attention(_wide(q), mixed_k, mixed_v).to(q.dtype)


def iterative_pinv(a: Tensor, iterations: int = 6) -> Tensor:
    """Pseudo-inverse by the iteration of Nyströmformer, shape (…, m, m). Eqs. (18), (19); Xiong and others.

    Singular values far below the largest are still missing after a few iterations; see section 5.
    """
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(f"iterative_pinv needs square matrices, got shape {tuple(a.shape)}")
    one = torch.eye(a.shape[-1], dtype=a.dtype)
    largest = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)  # at least the square of the largest singular value
    largest = largest.masked_fill(largest == 0, 1)  # the pseudo-inverse of 0 is 0
    z = a.mT / largest[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def nystrom_factors(q: Tensor, k: Tensor, landmarks: int, iterations: int | None = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Three matrices whose product stands for softmax(QKᵀ/√d). Eq. (17); Xiong and others.

    Parameters
    ----------
    landmarks
        Means of equal segments of queries and of keys; must divide n.
    iterations
        Of `iterative_pinv`; None for the true pseudo-inverse.

    Returns
    -------
    tensors of shape (…, n, m), (…, m, m), (…, m, n)
        In float32 for float16 and bfloat16: entries of the pseudo-inverse may be large.
    """
    n, d = q.shape[-2:]
    _require_positive("landmarks", landmarks)
    if k.shape[-2] != n or n % landmarks:
        raise ValueError(f"landmarks must divide the number of queries and keys, got {landmarks} for {n}")
    q_mean, k_mean = (_wide(x).unflatten(-2, (landmarks, n // landmarks)).mean(-2) for x in (q, k))
    left, middle, right = (
        (a / math.sqrt(d) @ b.mT).softmax(-1) for a, b in ((_wide(q), k_mean), (q_mean, k_mean), (q_mean, _wide(k)))
    )
    inverse = torch.linalg.pinv(middle) if iterations is None else iterative_pinv(middle, iterations)
    return left, inverse, right


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int | None = 6) -> Tensor:
    """Attention through landmarks, without the n × n matrix; not causal. Arguments as for `nystrom_factors`."""
    _require_fitting(q, k, v)
    left, inverse, right = nystrom_factors(q, k, landmarks, iterations)
    return (left @ (inverse @ (right @ _wide(v)))).to(q.dtype)


# --- The kernel view


def cosformer_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with relu(q)·relu(k) cos(π(i - j)/2n) in place of the exponential. Eq. (22); Qin and others.

    Not causal; linear in n, as the cosine of a difference is a product of features. A query whose weights are all 0
    gives zeros.
    """
    _require_fitting(q, k, v)
    n = max(q.shape[-2], k.shape[-2])

    def features(x: Tensor) -> Tensor:
        x = _wide(x)
        angle = (torch.arange(x.shape[-2], dtype=torch.float64) * (math.pi / 2 / n)).to(x.dtype)[:, None]
        return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)

    a, b = features(q), features(k)
    above, below = a @ (b.mT @ _wide(v)), a @ b.sum(-2, keepdim=True).mT
    return (above / below.masked_fill(below == 0, 1)).to(q.dtype)


# --- Dtypes, and checks of arguments


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scaled(q: Tensor, scale: float | None) -> Tensor:
    # The scale goes into the queries: these are n · d numbers, not n², and no product is ever larger than its score.
    return _wide(q) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _positions(queries: int, keys: int, order: Tensor | None) -> tuple[Tensor, Tensor]:
    if order is None:
        return torch.arange(queries), torch.arange(keys)
    if queries != keys or order.shape != (queries,) or not order.sort().values.equal(torch.arange(queries)):
        raise ValueError(f"order must be a permutation of the {queries} positions of queries and keys alike")
    return order, order


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _require_fitting(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = tuple(tuple(x.shape) for x in (q, k, v))
    if min(map(len, shapes)) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"q, k, v must have shapes (…, queries, d), (…, keys, d), (…, keys, width), got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if 0 in (q.shape[-2], k.shape[-2], q.shape[-1]):
        raise ValueError(f"there must be at least one query, key and feature, got {shapes}")

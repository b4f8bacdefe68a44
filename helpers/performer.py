"""Performer: random features whose inner products estimate the softmax kernel exp(q·k), and the attention they give.

    exp(q·k) = E[phi(q)·phi(k)],   phi(x) = exp(W x - ‖x‖²/2) / √m,   rows of W drawn from N(0, I)

The equations are those of 09_performer. Sources: K. Choromanski and others, "Rethinking attention with Performers"
(arXiv 2009.14794): positive and hyperbolic features, orthogonal rows, FAVOR+; A. Rahimi and B. Recht, "Random features
for large-scale kernel machines" (2007): the trigonometric features; F. Mezzadri, "How to generate random matrices from
the classical compact groups" (arXiv math-ph/0609050): the signs that QR needs.

Feature functions map tensors of shape (..., n, d) to (..., n, features). They treat each token by itself, so they may
be used in causal attention. `favor_attention` is `linear_attention` with them.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.linear_attention import State, linear_attention

Kind = Literal["positive", "trig", "hyperbolic", "orthogonal", "orthogonal bound"]


class Features(Protocol):
    """What `favor_attention` takes as `features`: the three functions below, or one of your own."""

    def __call__(self, x: Tensor, projection: Tensor, *, shift: float | Tensor | None = 0.0) -> Tensor:
        """Map (..., n, d) to (..., n, features), times exp(shift); for None times any positive factor of each token.

        A tensor of shape (..., n, 1) is a shift for each token. It belongs into the exponent: exp(shift) by itself may
        overflow where the product does not.
        """
        ...


# --- The random directions


def orthogonal_features(
    m: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    norms: Literal["chi", "sqrt_d"] = "chi",
    haar: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw m directions for random features, orthogonal to each other in blocks of d, each by itself as from N(0, I).

    Eq. (8) of 09_performer; Choromanski 2020, section 2.4. The draw is made in float64 on the CPU, so a seed gives the
    same directions for every `dtype`.

    Parameters
    ----------
    m, d
        Numbers of directions and of their coordinates. The last block is cut where d does not divide m.
    generator
        Source of randomness, on the CPU; None for torch's own.
    norms
        "chi": redrawn, as long as rows of N(0, I) are. "sqrt_d": all of length √d, for which the estimates are no
        longer unbiased but have lighter tails (the paper's SMREG).
    haar
        False leaves out the signs that make QR's matrix uniform, as several packages do. For demonstration only.
    dtype
        Of the result.

    Returns
    -------
    Tensor, shape (m, d)
    """
    for name, value in (("m", m), ("d", d)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if norms not in ("chi", "sqrt_d"):
        raise ValueError(f'norms must be "chi" or "sqrt_d", not {norms!r}')
    blocks = torch.randn(-(-m // d), d, d, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(blocks)
    if haar:
        # QR is unique only up to signs. LAPACK's choice depends on the matrix; a positive diagonal of R does not.
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    rows = q.mT.reshape(-1, d)[:m]
    if norms == "sqrt_d":
        return (rows * d**0.5).to(dtype)
    lengths = torch.randn(m, d, generator=generator, dtype=torch.float64, device="cpu").norm(dim=-1, keepdim=True)
    return (rows * lengths).to(dtype)


# --- Features


def positive_features(x: Tensor, projection: Tensor, *, shift: float | Tensor | None = 0.0) -> Tensor:
    """exp(W x - ‖x‖²/2) / √m: all positive, and phi(q)·phi(k) is exp(q·k) on average.

    Eq. (2) of 09_performer; Choromanski 2020, lemma 1.

    Parameters
    ----------
    x
        Shape (..., n, d), scaled already: for softmax(q·k / √d), give q and k divided by d^(1/4).
    projection
        W, shape (m, d).
    shift
        Added to the logarithm of the features; a tensor of shape (..., n, 1) for one shift a token. None divides each
        token's features by the largest of them, so that nothing overflows: right for the queries of normalised
        attention, where a factor of a query cancels, and wrong for keys, where it does not.

    Returns
    -------
    Tensor, shape (..., n, m)
    """
    x, projection, given = _prepare(x, projection)
    along = x @ projection.mT
    if shift is None:
        # Not detached: where something is added to the sum of the weights, the factor and its gradient do not cancel.
        return (along - along.amax(-1, keepdim=True)).exp().to(given)
    return ((along - _half_square(x) + shift).exp() * projection.shape[0] ** -0.5).to(given)


def hyperbolic_features(x: Tensor, projection: Tensor, *, shift: float | Tensor | None = 0.0) -> Tensor:
    """[exp(W x), exp(-W x)] exp(-‖x‖²/2) / √(2m): each direction is used forwards and backwards.

    Eq. (4) of 09_performer; Choromanski 2020, lemma 1. Parameters as for `positive_features`.

    Returns
    -------
    Tensor, shape (..., n, 2m)
    """
    return positive_features(x, torch.cat([projection, -projection]), shift=shift)


def trig_features(x: Tensor, projection: Tensor, *, shift: float | Tensor | None = 0.0) -> Tensor:
    """[cos W x, sin W x] exp(‖x‖²/2) / √m: also exp(q·k) on average, but a weight can come out negative.

    Eq. (3) of 09_performer; Rahimi 2007. Parameters as for `positive_features`; a shift of None leaves out exp(‖x‖²/2).

    Returns
    -------
    Tensor, shape (..., n, 2m)
    """
    x, projection, given = _prepare(x, projection)
    along = x @ projection.mT
    phi = torch.cat([along.cos(), along.sin()], -1) * projection.shape[0] ** -0.5
    return (phi if shift is None else phi * (_half_square(x) + shift).exp()).to(given)


# --- How far off they are


def relative_variance(q: Tensor, k: Tensor, m: int, kind: Kind = "positive") -> Tensor:
    """Variance of the estimate of exp(q·k) from m directions, divided by exp(2 q·k).

    Eqs. (5), (6), (10), (11) of 09_performer; Choromanski 2020, lemma 2 and theorem 2.

    Parameters
    ----------
    q, k
        Shape (..., d), scaled already.
    m
        Number of directions; "trig" and "hyperbolic" make 2m features of them.
    kind
        "positive", "trig" and "hyperbolic": independent directions, exact. "orthogonal": `positive_features` of
        `orthogonal_features`, exact. "orthogonal bound": the paper's upper bound of it, for m <= d.

    Returns
    -------
    Tensor, shape (...)
        Of the type of q and k, computed in float64; inf where it overflows.
    """
    if not isinstance(m, int) or m < 1:
        raise ValueError(f"m must be a whole number of at least 1, not {m!r}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} features and k has {k.shape[-1]}: make them equal")
    d, given = q.shape[-1], torch.promote_types(q.dtype, k.dtype)
    q, k = q.double(), k.double()
    s, delta = (q + k).square().sum(-1), (q - k).square().sum(-1)
    if kind == "positive":
        value = s.expm1() / m
    elif kind == "hyperbolic":
        value = 2 * (s / 2).sinh().square() / m  # cosh s - 1, without cancellation
    elif kind == "trig":
        value = 2 * (delta / 2).sinh().square() / m
    elif kind == "orthogonal":
        left = m % d
        pairs = (m - left) * (d - 1) + left * (left - 1)  # ordered pairs of directions that share a block
        value = s.expm1() / m - pairs / m**2 * (1 - _orthogonal_pair(s, d))
    elif kind == "orthogonal bound":
        if m > d:
            raise ValueError(f"the bound is for m <= d, got m = {m} and d = {d}")
        value = s.expm1() / m - 2 * (m - 1) / (m * (d + 2)) * (-s / 2).expm1().square()
    else:
        raise ValueError(
            f'kind must be "positive", "trig", "hyperbolic", "orthogonal" or "orthogonal bound", not {kind!r}'
        )
    return value.to(given)


def _orthogonal_pair(s: Tensor, d: int) -> Tensor:
    """E[exp((ω + ω')·z)] / exp(‖z‖²) of two orthogonal directions: exp(-s) times Kummer's 1F1(d; d/2; s/2).

    It lies between 0 and 1. From s = 50 on, exp(s) - 1 dwarfs it in float64, and its value at 50 is as good.
    """
    s = s.clamp(max=50)
    term = (-s).exp()
    total, i = term.clone(), 0
    # All terms are positive. They grow up to i ≈ s and then fall faster than any power.
    while (term > 1e-17 * total).any() or i < 50:
        term = term * (s / 2) / (i + 1) * (d + i) / (d / 2 + i)
        total, i = total + term, i + 1
    return total


# --- Attention


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    features: Features = positive_features,
    causal: bool = True,
    scale: float | None = None,
    shift: float = 0.0,
    center: tuple[Tensor, Tensor] | None = None,
    chunk_size: int = 64,
    initial_state: State | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, State]:
    """Estimate softmax attention in time and memory proportional to n (FAVOR+ with positive, orthogonal features).

    Eqs. (12)–(14) of 09_performer; Choromanski 2020, section 2 and algorithm 1. No stabiliser looks beyond a single
    token: a change of a later key leaves an earlier output as it was, to the last bit.

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., l, d) and (..., l, e); n = l if causal.
    projection
        The directions, shape (m, d), such as from `orthogonal_features`; one set for all heads.
    features
        `positive_features`, `hyperbolic_features` or `trig_features`. The last can make the sum of the weights zero or
        negative.
    causal
        Token i attends to the tokens j <= i only.
    scale
        Factor of the scores; None for 1/√d.
    shift
        Added to the logarithm of all features of all keys. It cancels, and keeps float32 from underflow, and so from
        0/0, where every key so far is long (scale · ‖k‖² above 170 or so; at the first token one such key is enough).
        Positive and hyperbolic features overflow where it exceeds about 88 - ‖w‖²/2, w the longest direction.
        `trig_features` *grow* with the length of a key: they overflow at such lengths, and need a negative shift. It
        must be known before the sequence: taken from the sequence, it would tell earlier outputs of later keys.
    center
        Two vectors, such as the means of q and of k over other data, each the same for all tokens: they broadcast
        against q and k, with a last axis but one of 1 where they have one. They are subtracted, and what that does to
        the softmax is undone: eq. (17) of 09_performer. The estimated function is the same, its variance grows with
        exp(‖q + k‖²) of the vectors that are left.
    chunk_size, initial_state
        As for `linear_attention`. A state goes with one projection, scale, shift and center.
    eps
        Added to the sum of the weights, each query's largest feature being 1 (for `trig_features`: at most 1/√m).

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : State
        After the last token, with s of shape (..., features, e).

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    if not isinstance(projection, Tensor) or projection.ndim != 2:
        raise ValueError(f"projection must be a tensor of shape (m, d), got {getattr(projection, 'shape', projection)}")
    if not isinstance(q, Tensor) or q.ndim < 2:
        raise ValueError(f"q must be a tensor of shape (..., tokens, features), got {getattr(q, 'shape', type(q))}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5  # one half of the scale to q, the other to k
    given = q.dtype

    if center is not None:
        q, k, v, log_weight = _centered(q, k, v, center, root**2)
        # The weight of a key travels as one more coordinate, so that its features are made chunk by chunk, too.
        q, k = F.pad(q, (0, 1)), torch.cat([k.expand(*log_weight.shape[:-1], -1), log_weight], -1)

    def of_q(x: Tensor) -> Tensor:
        x = x if center is None else x[..., :-1]
        return features(x * root, projection, shift=None)

    def of_k(x: Tensor) -> Tensor:
        if center is None:
            return features(x * root, projection, shift=shift)
        # One exponential: of a long key, the weight alone overflows and the features alone underflow.
        return features(x[..., :-1] * root, projection, shift=x[..., -1:] + shift)

    out, state = linear_attention(
        q,
        k,
        v,
        feature_map=(of_q, of_k),
        causal=causal,
        chunk_size=chunk_size,
        initial_state=initial_state,
        eps=eps,
    )
    return out.to(given), state


def _centered(
    q: Tensor, k: Tensor, v: Tensor, center: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q - a, k - c, v in float32 at least, and the logarithm of the factor that k then lacks.

    That is scale · a·k, here less scale · a·c, which is one constant for all keys. So the exponents stay bounded:
    with k - c in place of k, eq. (14) of 09_performer holds for w + a.
    """
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one type, got {q.dtype} and, for {name}, {getattr(x, 'dtype', x)}")
    work = torch.promote_types(v.dtype, torch.float32)
    a, c = (x.to(work) for x in center)
    for name, x, middle in (("q", q, a), ("k", k, c)):
        try:
            fits = torch.broadcast_shapes(x.shape, middle.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"the center of {name}, {tuple(middle.shape)}, must broadcast against {tuple(x.shape)}")
        if middle.ndim > 1 and middle.shape[-2] != 1:
            # One for each token would be wrong: what it leaves out of the scores is no longer the query's alone.
            raise ValueError(f"the center of {name} must be one vector for all tokens, got shape {tuple(middle.shape)}")
    k = k.to(work) - c
    try:
        log_weight = scale * (k * a).sum(-1, keepdim=True)
    except RuntimeError:
        raise ValueError(
            f"the center of q, {tuple(a.shape)}, and k, {tuple(k.shape)}, must broadcast against each other"
        ) from None
    return q.to(work) - a, k, v.to(work), log_weight


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2


def _prepare(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check the shapes and bring both to float32 or float64; also return the type that x had."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a tensor of floating-point numbers, not {getattr(x, 'dtype', type(x))}")
    if projection.ndim != 2 or x.ndim < 1 or x.shape[-1] != projection.shape[-1]:
        raise ValueError(
            f"x must have shape (..., d) and the projection (m, d), got {tuple(x.shape)} and {tuple(projection.shape)}"
        )
    work = torch.promote_types(x.dtype, torch.float32)
    return x.to(work), projection.to(work), x.dtype

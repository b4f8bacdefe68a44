"""Linear attention: attention whose weights are inner products of features, so that the brackets can be moved.

    o_i = sum_j phi(q_i)·psi(k_j) v_j / sum_j phi(q_i)·psi(k_j),   (QKᵀ)V = Q(KᵀV)

The causal sum runs over j <= i. It is computed in chunks: quadratic inside a chunk, through a state of size d × e from
chunk to chunk. A chunk of one token is the recurrent form, a chunk of all tokens the parallel one. The equations are
those of 08_linear_attention. Sources: A. Katharopoulos and others, "Transformers are RNNs" (arXiv 2006.16236); Y. Sun
and others, RetNet (arXiv 2307.08621), decay and chunks; S. Yang and others, GLA (arXiv 2312.06635), gates; I. Schlag
and others (arXiv 2102.11174), the delta rule; S. Yang and others (arXiv 2406.06484), its chunks.

All functions take tensors of shape (..., n, d): n tokens, d features, any leading axes that broadcast against each
other (a batch, heads). Nothing is scaled by 1/√d here except in `softmax_attention`; scale q where you want it. From
half precision, linear attention, the gates and the delta rule compute in float32, states and feature maps included, and
round once, at the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FeatureMap = Callable[[Tensor], Tensor]


class State(NamedTuple):
    """All that causal linear attention remembers of the tokens so far.

    Attributes
    ----------
    s : Tensor, shape (..., d, e)
        sum_j decay^(i - j) k_j v_jᵀ, with k_j after its feature map.
    z : Tensor, shape (..., d)
        The same sum with 1 in place of v_j: what the normaliser needs.
    """

    s: Tensor
    z: Tensor


# --- Feature maps and what they replace


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, which is x + 1 where x > 0 and exp(x) elsewhere: positive, so no weight can be negative.

    Eq. (5) of 08_linear_attention; Katharopoulos 2020, eq. 7.
    """
    return F.relu(x) + x.clamp(max=0).exp()  # not elu(x) + 1: in float32 that cancels to 0 from -17 on


def one_and_direction(x: Tensor) -> Tensor:
    """[1, x/‖x‖], shape (..., n, d) to (..., n, d + 1): features whose inner product is 1 + cos(q, k).

    A zero vector has no direction and becomes [1, 0].
    """
    return torch.cat([torch.ones_like(x[..., :1]), F.normalize(x, dim=-1)], dim=-1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """Attention with the softmax, by its definition: the n × m matrix of weights is made and held.

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., m, d) and (..., m, e).
    causal
        Token i attends to the tokens j <= i only; then n = m.
    scale
        Factor of the scores; None for 1/√d.

    Returns
    -------
    Tensor, shape (..., n, e)

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    _require_tensors(q, k, v, causal)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        # -inf before the softmax: a zero after it would leave the future in the normaliser.
        scores = scores.masked_fill(_future(scores), float("-inf"))
    return scores.softmax(-1) @ v


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = elu_plus_one,
    causal: bool = True,
    normalize: bool = True,
    decay: float | Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Make the n × m matrix that `linear_attention` multiplies v with and never holds. Parameters as there.

    Returns
    -------
    Tensor, shape (..., n, m)
    """
    _require_tensors(q, k, k, causal)
    work = _working_type(q)
    phi_q, phi_k = _features(q.to(work), k.to(work), feature_map)
    weights = phi_q @ phi_k.mT
    if causal:
        weights = weights.tril()
    if (gamma := _decay_of(decay, causal, weights)) is not None:
        position = torch.arange(weights.shape[-1], device=weights.device)
        weights = weights * gamma[..., None, None] ** (position[:, None] - position).clamp(min=0)
    return (weights / (weights.sum(-1, keepdim=True) + eps) if normalize else weights).to(q.dtype)


# --- Linear attention


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = elu_plus_one,
    causal: bool = True,
    normalize: bool = True,
    decay: float | Tensor | None = None,
    chunk_size: int = 64,
    initial_state: State | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, State]:
    """Attention with phi(q)·psi(k) in place of exp(q·k), in time and memory proportional to n.

    Eqs. (4), (8)–(11) and (19) of 08_linear_attention; Katharopoulos 2020, eqs. 5–12; RetNet, eq. 7 (chunks and decay).

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., m, d) and (..., m, e); n = m if causal.
    feature_map
        A function of (..., n, d) to (..., n, any), one for q and k or a pair; None for the features as they are. In the
        causal form it has to treat each token by itself, for it may be called with the tokens of one chunk, all
        leading axes flattened to one.
    causal
        Token i attends to the tokens j <= i only.
    normalize
        Divide by the sum of the weights. It is zero where all weights are (relu can do that); then give an `eps`.
    decay
        With causal only: a weight is multiplied by decay^(i - j), 0 <= decay <= 1. A number, or a tensor that
        broadcasts against the leading axes, such as one number a head. It gets no gradient.
    chunk_size
        Tokens that are treated as a square at once. It changes the time and the rounding, not the result.
    initial_state
        The state after the tokens that came before: splitting a sequence changes nothing.
    eps
        Added to the sum of the weights. Packages differ here, from 0 to 1e-4.

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : State
        After the last token; in float32 at least.

    Raises
    ------
    ValueError, TypeError
        Shapes, types or settings that do not fit together.
    """
    _require_tensors(q, k, v, causal)
    _require_chunk(chunk_size)
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    d, e, work = _features(q[..., :1, :], k[..., :1, :], feature_map)[1].shape[-1], v.shape[-1], _working_type(v)
    gamma = _decay_of(decay, causal, v)
    if initial_state is not None:
        _require_state(initial_state, d, e)
        leading = torch.broadcast_shapes(leading, initial_state.z.shape[:-1])
        start = torch.cat([initial_state.s, initial_state.z[..., None]], -1).to(work).expand(*leading, d, e + 1)
    else:
        start = torch.zeros((), dtype=work, device=v.device).expand(*leading, d, e + 1)

    if not causal:
        phi_q, phi_k = _features(q.to(work), k.to(work), feature_map)
        s = start + phi_k.mT @ _with_ones(v.to(work))  # first a d × (e + 1) matrix: this is all the trick
        out = _divided(phi_q @ s, normalize, eps)
        return out.to(v.dtype), State(s[..., :-1], s[..., -1])

    # One leading axis: a batch of matrices, however many axes there were.
    q, k, v, start = (
        x.expand(*leading, *x.shape[-2:]).reshape(leading.numel(), *x.shape[-2:]) for x in (q, k, v, start)
    )
    if gamma is not None:
        try:
            gamma = gamma.to(work).expand(leading).reshape(-1)
        except RuntimeError:
            raise ValueError(
                f"decay of shape {tuple(gamma.shape)} does not broadcast to the leading axes {tuple(leading)}"
            ) from None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, start)):
        phi_q, phi_k = _features(q.to(work), k.to(work), feature_map)
        out, s = _Causal.apply(phi_q, phi_k, _with_ones(v.to(work)), start, gamma, chunk_size)
        out = _divided(out, normalize, eps).to(v.dtype)
    else:  # all of it chunk by chunk: nothing of length n is made but the output

        def prepare(q_c: Tensor, k_c: Tensor, v_c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *_features(q_c, k_c, feature_map), _with_ones(v_c)

        def finish(out_c: Tensor) -> Tensor:
            return _divided(out_c, normalize, eps)

        out = torch.empty_like(v)
        s = _fill(out, q, k, v, start, gamma, chunk_size, prepare, finish)
    s = s.reshape(*leading, d, e + 1)
    return out.reshape(*leading, q.shape[-2], e), State(s[..., :-1], s[..., -1])


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = elu_plus_one,
    normalize: bool = True,
    decay: float | Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, State]:
    """Attend with one more token, in time and memory that do not depend on how many came before.

    Eqs. (9), (10) of 08_linear_attention; Katharopoulos 2020, eqs. 18–20.

    Parameters
    ----------
    q, k, v
        Of the one token, shapes (..., d), (..., d) and (..., e).
    state
        After the token before; None at the start. The other parameters are those of `linear_attention`.

    Returns
    -------
    output : Tensor, shape (..., e)
    state : State
        After this token.
    """
    q, k, v = (x[..., None, :] for x in (q, k, v))
    _require_tensors(q, k, v, True)
    work, gamma = _working_type(v), _decay_of(decay, True, v)
    phi_q, phi_k = _features(q.to(work), k.to(work), feature_map)
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    s = (phi_k.mT @ _with_ones(v.to(work))).expand(*leading, -1, -1)
    if state is not None:
        _require_state(state, phi_k.shape[-1], v.shape[-1])
        before = torch.cat([state.s, state.z[..., None]], -1)
        s = s + (before if gamma is None else gamma.to(work)[..., None, None] * before)
    out = _divided(phi_q @ s, normalize, eps).squeeze(-2)
    return out.to(v.dtype), State(s[..., :-1], s[..., -1])


class _Causal(torch.autograd.Function):
    """o_i = sum_{j <= i} decay^(i-j) (q_i·k_j) v_j, with a backward pass that is three linear attentions.

    Only the inputs are kept for it, not the weights of the chunks; eqs. (13)–(15) of 08_linear_attention.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor, gamma: Tensor | None, chunk: int) -> Any:
        ctx.save_for_backward(q, k, v, start, gamma)
        ctx.chunk = chunk
        out = torch.empty_like(v)
        return out, _fill(out, q, k, v, start, gamma, chunk)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_end: Tensor) -> Any:
        q, k, v, start, gamma = ctx.saved_tensors

        def attend(a: Tensor, b: Tensor, c: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
            return _Causal.apply(a, b, c, begin, gamma, ctx.chunk)  # so that it can be differentiated again

        def backwards(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            zero = torch.zeros_like(start[:1, :1, :1]).expand(len(start), b.shape[-1], c.shape[-1])
            out, end = attend(a.flip(-2), b.flip(-2), c.flip(-2), zero)
            return out.flip(-2), end

        d_q, _ = attend(d_out, v, k, start.mT)
        d_k, _ = backwards(v, d_out, q)
        d_v, d_start = backwards(k, q, d_out)
        # What the state after the last token is used for: token j has decayed n - 1 - j times by then.
        n = q.shape[-2]
        left = torch.arange(n - 1, -1, -1, device=q.device)
        kept = 1.0 if gamma is None else gamma[:, None, None] ** left[:, None]
        d_k = d_k + kept * (v @ d_end.mT)
        d_v = d_v + kept * (k @ d_end)
        once, all_along = (1.0, 1.0) if gamma is None else (gamma[:, None, None] ** p for p in (1, n))
        return d_q, d_k, d_v, once * d_start + all_along * d_end, None, None


def _fill(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    gamma: Tensor | None,
    chunk: int,
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Go over the chunks of (batch, n, features) from the state `s` on; write to `out` and return the last state.

    `prepare` turns a chunk of q, k and v into what is computed with, `finish` the result into what is written.
    """
    n, work = q.shape[-2], s.dtype
    if gamma is not None:
        position = torch.arange(min(chunk, n), device=v.device)
        powers = gamma[:, None] ** torch.arange(len(position) + 1, device=v.device)
        fading = powers[:, (position[:, None] - position).clamp(min=0)]
    for first in range(0, n, chunk):
        here = slice(first, min(first + chunk, n))
        q_c, k_c, v_c = (x[:, here].to(work) for x in (q, k, v))
        if prepare is not None:
            q_c, k_c, v_c = prepare(q_c, k_c, v_c)
        inside = (q_c @ k_c.mT).tril_()
        if gamma is not None:
            length = q_c.shape[1]
            inside *= fading[:, :length, :length]
            q_c = q_c * powers[:, 1 : length + 1, None]
            k_c = k_c * powers[:, :length, None].flip(1)
        result = torch.baddbmm(q_c @ s, inside, v_c)
        s = torch.baddbmm(s if gamma is None else powers[:, length, None, None] * s, k_c.mT, v_c)
        out[:, here] = result if finish is None else finish(result)
    return s


# --- Two other ways to write to the same state


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Forget by features and by data: S_i = diag(gate_i) S_{i-1} + k_i v_iᵀ, o_i = S_iᵀ q_i, token by token.

    Eq. (20) of 08_linear_attention; GLA, eq. 3. Without a normaliser.

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., n, d) and (..., n, e).
    gate
        Shape (..., n, d), or (..., n, 1) for one gate a token; in [0, 1].
    initial_state
        Shape (..., d, e).

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : Tensor, shape (..., d, e)
    """
    _require_tensors(q, k, v, True)
    if gate.shape[-2] != k.shape[-2] or gate.shape[-1] not in (1, k.shape[-1]):
        raise ValueError(
            f"gate must have shape (..., {k.shape[-2]}, {k.shape[-1]}) or (..., {k.shape[-2]}, 1), "
            f"got {tuple(gate.shape)}"
        )
    work, dtype = _working_type(v), v.dtype
    q, k, v, gate = (x.to(work) for x in (q, k, v, gate))
    s = torch.zeros((), dtype=work, device=v.device) if initial_state is None else initial_state
    out = []
    for i in range(q.shape[-2]):
        s = gate[..., i, :, None] * s + k[..., i, :, None] * v[..., i, None, :]
        out.append(q[..., i, None, :] @ s)
    return torch.cat(out, dim=-2).to(dtype), s


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: float | Tensor = 1.0,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Overwrite instead of adding: S_i = S_{i-1} + beta_i k_i (v_i - S_{i-1}ᵀ k_i)ᵀ, o_i = S_iᵀ q_i.

    Eqs. (21), (22) of 08_linear_attention; Schlag 2021, and Yang 2024 for the chunks. What is written under k_i is
    first read, and only the difference is added. A triangular system gives all differences of a chunk at once.

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., n, d) and (..., n, e). With ‖k‖ = 1 and beta = 1, reading k_i gives v_i.
    beta
        A number, or shape (..., n). Stable for 0 <= beta ‖k‖² <= 2.
    chunk_size
        Tokens that are treated as a square at once; it does not change the result.
    initial_state
        Shape (..., d, e).

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : Tensor, shape (..., d, e)
    """
    _require_tensors(q, k, v, True)
    _require_chunk(chunk_size)
    n, dtype = q.shape[-2], v.dtype
    q, k, v = (x.to(_working_type(x)) for x in (q, k, v))
    beta = torch.as_tensor(beta, dtype=v.dtype, device=v.device)
    if beta.ndim and beta.shape[-1] != n:
        raise ValueError(f"beta must be a number or have shape (..., {n}), got {tuple(beta.shape)}")
    beta = beta.expand(torch.broadcast_shapes(beta.shape, (n,)))[..., None]
    if initial_state is None:
        leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        initial_state = torch.zeros(*leading, k.shape[-1], v.shape[-1], dtype=v.dtype, device=v.device)
    s, out = initial_state, []
    for first in range(0, n, chunk_size):
        q_c, k_c, v_c, b_c = (x[..., first : first + chunk_size, :] for x in (q, k, v, beta))
        # u_i = beta_i (v_i - Sᵀk_i - sum_{j<i} (k_i·k_j) u_j): lower triangular in the unknown u.
        system = (b_c * (k_c @ k_c.mT)).tril(-1) + torch.eye(k_c.shape[-2], dtype=v.dtype, device=v.device)
        u = torch.linalg.solve_triangular(system, b_c * (v_c - k_c @ s), upper=False)
        out.append((q_c @ k_c.mT).tril() @ u + q_c @ s)
        s = s + k_c.mT @ u
    return torch.cat(out, dim=-2).to(dtype), s


def effective_rank(matrix: Tensor) -> Tensor:
    """How many directions a matrix really uses: exp of the entropy of its normalised singular values.

    Eq. (17) of 08_linear_attention; O. Roy and M. Vetterli, "The effective rank" (2007). Between 1 and the rank;
    k equal singular values and zeros give k.

    Parameters
    ----------
    matrix
        Shape (..., n, m), not zero.

    Returns
    -------
    Tensor, shape (...)
    """
    share = torch.linalg.svdvals(matrix.to(_working_type(matrix)))
    share = share / share.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


# --- What is asked of the arguments


def _with_ones(v: Tensor) -> Tensor:
    return F.pad(v, (0, 1), value=1.0)


def _divided(out: Tensor, normalize: bool, eps: float) -> Tensor:
    """Divide by the last column, what came of the ones, or only drop it."""
    return out[..., :-1] / (out[..., -1:] + eps) if normalize else out[..., :-1]


def _working_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _future(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def _features(
    q: Tensor, k: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None
) -> tuple[Tensor, Tensor]:
    if feature_map is None:
        return q, k
    of_q, of_k = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    phi_q, phi_k = of_q(q), of_k(k)
    for name, x, phi in (("q", q, phi_q), ("k", k, phi_k)):
        if phi.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"the feature map turned {name} of shape {tuple(x.shape)} into {tuple(phi.shape)}: "
                "it may change the last axis only"
            )
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(f"the feature maps give q {phi_q.shape[-1]} features and k {phi_k.shape[-1]}: make them equal")
    return phi_q, phi_k


def _decay_of(decay: float | Tensor | None, causal: bool, like: Tensor) -> Tensor | None:
    if decay is None:
        return None
    if not causal:
        raise ValueError("decay needs an order of the tokens: it goes with causal=True only")
    gamma = torch.as_tensor(decay, dtype=_working_type(like), device=like.device)
    if gamma.requires_grad:
        raise ValueError("decay gets no gradient here: detach it, or use gated_linear_attention")
    if not ((gamma >= 0) & (gamma <= 1)).all():
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    return gamma


def _require_tensors(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating-point numbers, not {getattr(x, 'dtype', type(x))}")
        if x.ndim < 2 or x.shape[-2] == 0:
            raise ValueError(
                f"{name} must have shape (..., tokens, features) with at least one token, got {tuple(x.shape)}"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} features and k has {k.shape[-1]}: make them equal")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"there are {k.shape[-2]} keys and {v.shape[-2]} values: make them equal")
    if causal and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}")
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"the leading axes of q, k and v do not broadcast: {shapes}") from None


def _require_chunk(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, not {chunk_size!r}")


def _require_state(state: State, d: int, e: int) -> None:
    if not isinstance(state, State):
        raise TypeError(f"a state must be a State(s, z), not {type(state).__name__}")
    if state.s.shape[-2:] != (d, e) or state.z.shape[-1:] != (d,):
        raise ValueError(
            f"the state must have s of shape (..., {d}, {e}) and z of shape (..., {d}), "
            f"got {tuple(state.s.shape)} and {tuple(state.z.shape)}"
        )

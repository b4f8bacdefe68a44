"""The two suspects of linear attention, gradients and dilution, and what TransNormer does about them.

    p_j = f(s_j) / sum_k f(s_k),   NormAttention: O = RMSNorm(Q(KᵀV)),   DiagAttention: softmax within blocks

The equations are those of 10_transnormer; `linear_attention` is that of 08. Source: Z. Qin and others, "The Devil in
Linear Transformer" (arXiv 2210.10340).

Tensors have shape (..., n, d): n tokens, d features, leading axes that broadcast. A *model* is a
`helpers.byte_model.ByteModel`, and `two_stage` gives the attentions that it takes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from helpers.byte_model import Attention, ByteModel, load_bytes
from helpers.linear_attention import FeatureMap, State, elu_plus_one, linear_attention

# --- Derivatives and bounds


def weights_jacobian(p: Tensor, rate: float | Tensor) -> Tensor:
    """Differentiate attention weights p_j = f(s_j) / sum_k f(s_k) by the scores: rate_k (1[j = k] p_j - p_j p_k).

    Eq. (2) of 10_transnormer; Qin 2022, section 3.1.

    Parameters
    ----------
    p
        The weights, shape (..., n).
    rate
        f'(s)/f(s), a number or shape (..., n): 1 for the softmax, 1/s for linear attention.

    Returns
    -------
    Tensor, shape (..., n, n)
        Row j, column k: how weight j changes with score k.
    """
    rate = torch.as_tensor(rate, dtype=p.dtype, device=p.device).expand(p.shape)
    return rate[..., None, :] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the root mean square of the last axis, x / √(mean(x²) + eps), without a gain. Eq. (8).

    Half precision is computed in float32 and rounded once, at the end.
    """
    (wide,) = _wide(x)
    # Squares overflow long before their root does. Rows with an entry above 1 are divided by the largest one first;
    # the result does not depend on this factor, so no gradient has to flow through it.
    size = wide.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)
    wide = wide / size
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps / size.square())).to(x.dtype)


def rms_norm_jacobian(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Differentiate `rms_norm`: (I - x xᵀ / (d (σ² + eps))) / √(σ² + eps), shape (..., d) to (..., d, d).

    Eq. (10) of 10_transnormer. Its largest singular value is 1/√(σ² + eps) at most: along x it is smaller.
    """
    power = (x.square().mean(-1) + eps)[..., None, None]
    outer = x[..., :, None] * x[..., None, :]
    return (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - outer / (x.shape[-1] * power)) / power.sqrt()


def norm_gradient_bound(upstream: float, values: float, eps: float, *, paper_width: int | None = None) -> float:
    """Bound the gradient of the loss by a score of NormAttention: c1 c2 / √eps.

    Eq. (11) of 10_transnormer. Qin 2022 (section 4.1) has 3 c1 c2 d / (2 √eps), which is larger by 1.5 d.

    Parameters
    ----------
    upstream
        c1, the largest length of a row of the gradient by the output.
    values
        c2, the largest length of a row of V.
    eps
        That of `rms_norm`.
    paper_width
        d, for the paper's bound in place of the smaller one.
    """
    if not eps > 0:
        raise ValueError(f"there is no bound for eps = {eps}: it must be positive")
    return upstream * values / eps**0.5 * (1.0 if paper_width is None else 1.5 * paper_width)


# --- NormAttention


def norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    feature_map: FeatureMap | None = elu_plus_one,
    causal: bool = True,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """Linear attention without a denominator, each output row brought to length √d: RMSNorm(Q(KᵀV)).

    Eq. (8) of 10_transnormer; Qin 2022, section 4.1. Heads are normalised one by one.

    Parameters
    ----------
    q, k, v, feature_map, causal, chunk_size
        As in `helpers.linear_attention.linear_attention`.
    state
        After the tokens that came before.
    eps
        That of `rms_norm`.

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : State
        After the last token.

    Raises
    ------
    ValueError, TypeError
        Shapes, types or settings that do not fit together.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    # Half precision overflows in the sum over all tokens: widen before it, and round once, after the norm.
    out, state = linear_attention(
        *_wide(q, k, v),
        feature_map=feature_map,
        causal=causal,
        normalize=False,
        chunk_size=chunk_size,
        initial_state=state,
    )
    return rms_norm(out, eps).to(v.dtype), state


# --- DiagAttention


class OpenBlock(NamedTuple):
    """What DiagAttention remembers: the keys and values of the block that is not full yet, fewer than a block of them.

    Attributes
    ----------
    k, v : Tensor, shapes (..., m, d) and (..., m, e)
    """

    k: Tensor
    v: Tensor


def diag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: OpenBlock | None = None,
    *,
    block: int,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, OpenBlock]:
    """Softmax attention within blocks of `block` tokens that do not overlap; the last may be shorter.

    Eq. (15) of 10_transnormer; Qin 2022, section 4.2. Time in proportion to n · block · d, memory to n (block + d).

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., n, d) and (..., n, e).
    state
        The open block after the tokens that came before, with `causal` only.
    block
        Tokens in a block.
    causal
        Token i attends to the tokens j <= i of its block only.
    scale
        Factor of the scores; None for 1/√d.

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : OpenBlock
        After the last token.

    Raises
    ------
    ValueError, TypeError
        Shapes, types or settings that do not fit together.
    """
    _require_blocks(q, k, v, block)
    block = int(block)
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    if state is not None:
        _require_open_block(state, k, v, leading, block, causal)
    q, k, v = (x.expand(*leading, *x.shape[-2:]) for x in (q, k, v))
    out, n, done = [], q.shape[-2], 0
    if state is not None and state.k.shape[-2]:
        # Fill the open block first: the next tokens see what is in it already.
        before = state.k.shape[-2]
        done = min(block - before, n)
        old_k, old_v = (x.expand(*leading, *x.shape[-2:]) for x in state)
        keys, values = torch.cat([old_k, k[..., :done, :]], -2), torch.cat([old_v, v[..., :done, :]], -2)
        seen = torch.ones(done, before + done, dtype=torch.bool, device=q.device).tril(before)
        out.append(F.scaled_dot_product_attention(q[..., :done, :], keys, values, attn_mask=seen, scale=scale))
        if before + done < block:
            return out[0], OpenBlock(keys, values)
    full = done + (n - done) // block * block
    if full > done:  # blocks become one more leading axis
        parts = (x[..., done:full, :].unflatten(-2, (-1, block)) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*parts, is_causal=causal, scale=scale).flatten(-3, -2))
    rest = OpenBlock(k[..., full:, :], v[..., full:, :])
    if full < n:
        out.append(F.scaled_dot_product_attention(q[..., full:, :], *rest, is_causal=causal, scale=scale))
    return torch.cat(out, -2), OpenBlock(rest.k.clone(), rest.v.clone())  # a view would keep all of k and v alive


def diag_multiplications(n: int, block: int, d: int) -> int:
    """Count the multiplications of `diag_attention` without a mask: 2 d per query and key of one block.

    Eq. (16) of 10_transnormer: 2 n · block · d if the blocks are full; with block = n, full attention.
    """
    if min(n, block, d) < 1:
        raise ValueError(f"n, block and d must be at least 1, got {n}, {block} and {d}")
    full, rest = divmod(n, block)
    return 2 * d * (full * block**2 + rest**2)


# --- The two stages, as attentions of a byte model


def norm_stateful(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, State]:
    """NormAttention as an attention of `helpers.byte_model`."""
    return norm_attention(q, k, v, state)


def unscaled_stateful(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, State]:
    """Linear attention without the denominator and with nothing in its place: "w/o scaling"."""
    return linear_attention(q, k, v, normalize=False, initial_state=state)


def two_stage(layers: int = 2, *, early: int = 1, block: int = 32, late: Attention = norm_stateful) -> list[Attention]:
    """Give the attentions of the layers of a TransNormer: DiagAttention in the `early` first ones, then `late`.

    Qin 2022, section 4.3: half of the layers are early ones.
    """
    if not 0 <= early <= layers:
        raise ValueError(f"early must lie between 0 and the number of layers {layers}, got {early}")
    return [partial(diag_attention, block=block)] * early + [late] * (layers - early)


# --- Instruments


def attention_mass(weights: Tensor, width: int, *, causal: bool = True) -> Tensor:
    """Share of each query's attention that falls on the `width` nearest tokens, its own included.

    Eq. (12) of 10_transnormer; Qin 2022, section 3.2, "locally accumulated attention score".

    Parameters
    ----------
    weights
        Shape (..., n, n), not negative; rows need not sum to 1.
    width
        With `causal` the tokens i - width + 1 … i. Without, width // 2 tokens on either side and the token itself, cut
        at the ends of the sequence.

    Returns
    -------
    Tensor, shape (..., n)
    """
    if not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(f"width must be a whole number of at least 1, not {width!r}")
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must have shape (..., n, n), got {tuple(weights.shape)}")
    near = weights.tril().triu(1 - width) if causal else weights.tril(width // 2).triu(-(width // 2))
    return near.sum(-1) / (weights.tril() if causal else weights).sum(-1)


@torch.no_grad()
def attention_maps(model: ByteModel, tokens: Tensor) -> Tensor:
    """Read the weights out of every layer: an attention is linear in v, so the identity for v gives the weights.

    NormAttention is linear only up to a factor a row, which dividing by the sum of the row takes away.

    Parameters
    ----------
    tokens
        Shape (batch, n).

    Returns
    -------
    Tensor, shape (layers, batch, heads, n, n)
        Rows sum to 1; a row without any weight, as the relu can make one, is NaN.
    """
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in model.blocks]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for layer, x in zip(model.blocks, inputs, strict=True):
        q, k, v = layer.project(x)
        identity = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-1], v.shape[-2])
        weights, _ = layer.attention(q, k, identity, None)
        maps.append(weights / weights.sum(-1, keepdim=True))
    return torch.stack(maps)


def qk_gradient_norms(model: ByteModel) -> list[float]:
    """Length of the loss's gradient by the weights that make q and k, for each layer; after a backward pass."""
    norms = []
    for layer in model.blocks:
        gradient = layer.qkv.weight.grad
        if gradient is None:
            raise ValueError("there is no gradient yet: call backward() on a loss first")
        norms.append(gradient[: 2 * len(gradient) // 3].norm().item())  # q, k, v lie below each other
    return norms


class TrainingMeter:
    """The instruments of both suspects, read while `helpers.byte_model.train` runs: pass it as `on_step`.

    Attributes
    ----------
    norms : list of list of float
        For each step so far, what `qk_gradient_norms` says.
    """

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    def __call__(self, step: int, model: ByteModel) -> None:
        """Read the gradients of this step."""
        self.norms.append(qk_gradient_norms(model))

    def result(self, model: ByteModel, *, length: int = 128, pieces: int = 16) -> dict[str, NDArray[np.float64]]:
        """Give the gradients of all steps, and the attention mass of the trained model on text that it has not seen.

        Returns
        -------
        dict
            "gradients", shape (layers, steps). "mass", shape (layers, length): entry w - 1 is `attention_mass` within
            w tokens, mean over pieces, heads and the queries of the second half, which have a past to choose from.
        """
        text = load_bytes()[1]
        starts = np.linspace(0, len(text) - length, pieces).astype(int)
        tokens = torch.from_numpy(text[starts[:, None] + np.arange(length)].astype(np.int64))
        maps = attention_maps(model, tokens).mean((1, 2))
        mass = [attention_mass(maps, width)[:, length // 2 :].mean(-1) for width in range(1, length + 1)]
        return {"gradients": np.array(self.norms).T, "mass": torch.stack(mass, -1).numpy()}


def relative_spread(x: ArrayLike, window: int | None = None) -> NDArray[np.float64]:
    """Divide the standard deviation by the mean, along the last axis. Eq. (17) of 10_transnormer; Qin 2022, table 2.

    NaN where a value is not finite: a training that diverged has no spread.

    Parameters
    ----------
    x
        Shape (..., steps).
    window
        Steps of a window. Then the spread is that inside the window, its mean over all places of the window: a slow
        trend does not count.
    """
    x = np.asarray(x, float)
    x = np.where(np.isfinite(x).all(-1, keepdims=True), x, np.nan)
    if window is None:
        return x.std(-1) / x.mean(-1)
    if not 1 <= window <= x.shape[-1]:
        raise ValueError(f"window must lie between 1 and the {x.shape[-1]} steps, got {window}")
    pieces = np.lib.stride_tricks.sliding_window_view(x, window, axis=-1)
    return (pieces.std(-1) / pieces.mean(-1)).mean(-1)


# --- What is asked of the arguments


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Float32 at least; anything that is no floating tensor passes, for `linear_attention` to refuse."""
    return [
        x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in tensors
    ]


def _require_blocks(q: Tensor, k: Tensor, v: Tensor, block: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating-point numbers, not {getattr(x, 'dtype', type(x))}")
        if x.ndim < 2 or x.shape[-2] == 0:
            raise ValueError(f"{name} must have shape (..., tokens, features) with a token, got {tuple(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.shape[-2] == k.shape[-2] == v.shape[-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q, k and v must have as many tokens, q and k as many features, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if isinstance(block, bool) or not isinstance(block, int | np.integer) or block < 1:
        raise ValueError(f"block must be a whole number of at least 1, not {block!r}")


def _require_open_block(state: OpenBlock, k: Tensor, v: Tensor, leading: torch.Size, block: int, causal: bool) -> None:
    if not isinstance(state, OpenBlock):
        raise TypeError(f"a state must be an OpenBlock(k, v), not {type(state).__name__}")
    if not causal:
        raise ValueError("a state needs an order of the tokens: it goes with causal=True only")
    m = state.k.shape[-2]
    if m >= block or state.v.shape[-2] != m or state.k.shape[-1] != k.shape[-1] or state.v.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"the state must have k of shape (..., m, {k.shape[-1]}) and v of shape (..., m, {v.shape[-1]}), "
            f"m < {block}, got {tuple(state.k.shape)} and {tuple(state.v.shape)}"
        )
    if not state.k.dtype == state.v.dtype == k.dtype:
        raise TypeError(f"the state must be of the type {k.dtype}, got {state.k.dtype} and {state.v.dtype}")
    for name, x in (("k", state.k), ("v", state.v)):
        own = x.shape[:-2]
        if len(own) > len(leading) or any(a not in (1, b) for a, b in zip(own[::-1], leading[::-1], strict=False)):
            raise ValueError(f"the state's {name} has leading axes {tuple(own)}, which do not fit {tuple(leading)}")

"""FLASH: attention and feed-forward merged into one gated layer with a single head, then made linear in n.

    U, V, Z = silu(X W_u), silu(X W_v), silu(X W_z),    Q, K = gamma·Z + beta,    O = (U ⊙ A V) W_o

A is relu²(Q Kᵀ/√s) divided by the number of keys that a query sees: the gated attention unit (GAU), quadratic in n. In
mixed chunk attention that A acts inside chunks only; across chunks acts linear attention without a kernel, one state of
s × e numbers. The equations are those of 11_flash. Sources: W. Hua and others, "Transformer quality in linear time"
(arXiv 2202.10447); J. Su, kexue.fm 8934 (the 1/n and 1/s), 8990 (initialisation), 9019 (softmax in its place).

Tensors have shape (..., n, features). Here d is the width of the model, e of U and V, s of Q and K. The two attention
functions compute half precision in float32, states included, and round once, at the output.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.byte_model import ByteModel, load_bytes, softmax_cached
from helpers.linear_attention import State, linear_attention

Kernel = Literal["relu2", "softmax"]


# --- Attention with a squared relu


def squared_relu_weights(q: Tensor, k: Tensor, *, causal: bool = True) -> Tensor:
    """Make the matrix A = relu²(q·k/√s) / (number of keys that the query sees).

    Eq. (2) of 11_flash; kexue.fm 8934. Dividing by a number that does not depend on the content makes each row a
    mean; its sum is not 1.

    Parameters
    ----------
    q, k
        Shapes (..., n, s) and (..., m, s).
    causal
        The queries are the last n of the m tokens, n <= m, and each sees the keys up to its own place.

    Returns
    -------
    Tensor, shape (..., n, m)
    """
    _require({"q": q, "k": k})
    n, m = q.shape[-2], k.shape[-2]
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} features and k has {k.shape[-1]}: make them equal")
    if causal and n > m:
        raise ValueError(f"causal attention needs a key for each query, got {n} queries and {m} keys")
    # Squares leave the range of float16 above 256, and bfloat16 cannot count further than 256.
    work = torch.promote_types(q.dtype, torch.float32)
    weights = F.relu(q.to(work) @ k.to(work).mT * q.shape[-1] ** -0.5).square()
    if not causal:
        return (weights / m).to(q.dtype)
    # Zeros after the relu: nothing is normalised by the row's own sum, so the future cannot leak through it.
    seen = torch.arange(m - n + 1, m + 1, device=q.device, dtype=work)
    return (weights.tril(m - n) / seen[:, None]).to(q.dtype)


class ChunkState(NamedTuple):
    """What causal mixed chunk attention remembers.

    Attributes
    ----------
    far : State or None
        Of linear attention, with all chunks before the last one; None if there are none.
    before : int
        Number of tokens in them.
    c : int
        Size of a chunk.
    k, k_lin, v : Tensor, shapes (..., 1 to c, s), (..., 1 to c, s) and (..., 1 to c, e)
        The tokens of the last chunk, which need not be complete.
    """

    far: State | None
    before: int
    c: int
    k: Tensor
    k_lin: Tensor
    v: Tensor


def mixed_chunk_attention(
    q: Tensor,
    k: Tensor,
    q_lin: Tensor,
    k_lin: Tensor,
    v: Tensor,
    *,
    chunk_size: int = 64,
    causal: bool = True,
    initial_state: ChunkState | None = None,
) -> tuple[Tensor, ChunkState | None]:
    """Attend by `squared_relu_weights` within the own chunk, and linearly to all others; time and memory linear in n.

    Eq. (11) of 11_flash; Hua 2022. Each of the two parts is a mean over the tokens that it sums:
    the linear one over the tokens of the *other* chunks. (In Hua 2022 its form that is not causal includes the own
    chunk; then one chunk would not be the quadratic attention.)

    Parameters
    ----------
    q, k
        For the own chunk, shape (..., n, s).
    q_lin, k_lin
        For the other chunks, shape (..., n, s).
    v
        Shape (..., n, e).
    chunk_size
        c; the last chunk may be shorter. With c >= n this is ``squared_relu_weights(q, k) @ v``.
    causal
        The other chunks are then those before.
    initial_state
        After the tokens that came before, with the same `chunk_size`; causal only. Splitting changes nothing.

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : ChunkState, or None if not causal

    Raises
    ------
    ValueError, TypeError
        Shapes, types or settings that do not fit together.
    """
    given = {"q": q, "k": k, "q_lin": q_lin, "k_lin": k_lin, "v": v}
    _require(given)
    if len({x.shape[-2] for x in given.values()}) > 1 or len({x.shape[-1] for x in (q, k, q_lin, k_lin)}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise ValueError(f"all need the same number of tokens, q, k, q_lin and k_lin also of features, got {shapes}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, not {chunk_size!r}")
    dtype, work = v.dtype, torch.promote_types(v.dtype, torch.float32)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in given.values()))
    q, k, q_lin, k_lin, v = (x.to(work).expand(*leading, *x.shape[-2:]) for x in given.values())
    q_lin = q_lin * q.shape[-1] ** -0.5
    if causal:
        out, state = _towards_the_past(q, k, q_lin, k_lin, v, chunk_size, initial_state)
    elif initial_state is None:
        out, state = _to_both_sides(q, k, q_lin, k_lin, v, chunk_size), None
    else:
        raise ValueError("an initial_state goes with causal=True only")
    return out.to(dtype), state


def _towards_the_past(
    q: Tensor, k: Tensor, q_lin: Tensor, k_lin: Tensor, v: Tensor, c: int, start: ChunkState | None
) -> tuple[Tensor, ChunkState]:
    n, far, before = q.shape[-2], None, 0
    if start is not None:
        _require_state(start, k, v, c)
        far, before = start.far, start.before
        k, k_lin, v = (
            torch.cat([old.expand(*new.shape[:-2], *old.shape[-2:]), new], -2)
            for old, new in zip((start.k, start.k_lin, start.v), (k, k_lin, v), strict=True)
        )
    old = k.shape[-2] - n  # keys whose queries were answered by an earlier call
    out, last = [], (torch.zeros_like(k_lin[..., :1, :]), torch.zeros_like(v[..., :1, :]))
    for first in range(0, n + old, c):
        here = slice(first, min(first + c, n + old))
        ask = slice(max(first - old, 0), here.stop - old)
        if ask.stop > 0:
            answer = squared_relu_weights(q[..., ask, :], k[..., here, :]) @ v[..., here, :]
            if before + first:
                # The state takes in each chunk when the next one asks: so it never holds the own chunk.
                sums, far = linear_attention(
                    q_lin[..., ask, :], *last, feature_map=None, causal=False, normalize=False, initial_state=far
                )
                answer = answer + sums / (before + first)
            out.append(answer)
        last = k_lin[..., here, :], v[..., here, :]
    # Copies: a view would keep all n tokens in memory, and change with what the caller does to them.
    tail = (x.clone() for x in (k[..., first:, :], *last))
    return torch.cat(out, -2), ChunkState(far, before + first, c, *tail)


def _to_both_sides(q: Tensor, k: Tensor, q_lin: Tensor, k_lin: Tensor, v: Tensor, c: int) -> Tensor:
    parts = list(zip(*(x.split(c, -2) for x in (q, k, q_lin, k_lin, v)), strict=True))
    own = [k_lin_c.mT @ v_c for *_, k_lin_c, v_c in parts]
    total, out = sum(own[1:], start=own[0]), []
    for (q_c, k_c, q_lin_c, _, v_c), mine in zip(parts, own, strict=True):
        answer = squared_relu_weights(q_c, k_c, causal=False) @ v_c
        if others := v.shape[-2] - v_c.shape[-2]:
            answer = answer + q_lin_c @ (total - mine) / others
        out.append(answer)
    return torch.cat(out, -2)


# --- The gated attention unit


class Weights(NamedTuple):
    """Parameters of one gated attention unit.

    Attributes
    ----------
    u, v : Tensor, shape (d, e)
        To the gate and to the values.
    z : Tensor, shape (d, s), or (d, 2s) or (d, 4s)
        To what queries and keys share; or side by side, a matrix for each of them.
    gamma, beta : Tensor, shape (2, s), or (4, s) for mixed chunks
        Scale and offset that make q and k of it; then q_lin and k_lin.
    o : Tensor, shape (e, d)
        Back to the width of the model.
    """

    u: Tensor
    v: Tensor
    z: Tensor
    gamma: Tensor
    beta: Tensor
    o: Tensor


def gated_attention_unit(
    x: Tensor,
    weights: Weights,
    *,
    kernel: Kernel = "relu2",
    chunk_size: int | None = None,
    rotary: bool = False,
    causal: bool = True,
    state: Any = None,
) -> tuple[Tensor, Any]:
    """Apply one gated attention unit, without norm and residual: O = (U ⊙ A V) W_o.

    Eqs. (1) and (2) of 11_flash; Hua 2022.

    Parameters
    ----------
    x
        Shape (..., n, d).
    kernel
        "relu2" for `squared_relu_weights`; "softmax" for softmax with scale 1/√s in its place, as in kexue.fm 9019.
    chunk_size
        For mixed chunks; None for all pairs of tokens.
    rotary
        Turn queries and keys by angles proportional to their place (`rotate`), so that scores depend on distances.
    causal
        No token sees a later one.
    state
        After the tokens before, as returned by an earlier call. Keys and values of all of them, or a `ChunkState`.

    Returns
    -------
    output : Tensor, shape (..., n, d)
    state
        None if not causal.
    """
    _require({"x": x})
    if kernel not in ("relu2", "softmax"):
        raise ValueError(f'kernel must be "relu2" or "softmax", got {kernel!r}')
    if kernel == "softmax" and chunk_size is not None:
        raise ValueError("mixed chunks go with kernel='relu2' only")
    if state is not None and not causal:
        raise ValueError("a state goes with causal=True only")
    maps, features = 2 if chunk_size is None else 4, weights.z.shape[-1]
    allowed = [(maps, features)] + [(maps, features // maps)] * (features % maps == 0)
    if weights.gamma.shape != weights.beta.shape or tuple(weights.gamma.shape) not in allowed:
        raise ValueError(
            f"gamma and beta must have shape {' or '.join(map(str, allowed))}, "
            f"got {tuple(weights.gamma.shape)} and {tuple(weights.beta.shape)}"
        )
    u, v = (F.silu(x @ w) for w in weights[:2])
    projections = _queries_and_keys(x, weights, _tokens_seen(state) if rotary else None)
    if chunk_size is not None:
        mixed, state = mixed_chunk_attention(*projections, v, chunk_size=chunk_size, causal=causal, initial_state=state)
        return (u * mixed) @ weights.o, state
    q, k = projections
    if state is not None:
        k, v = torch.cat([state[0], k], -2), torch.cat([state[1], v], -2)
    work = torch.promote_types(v.dtype, torch.float32)  # so that A is not rounded before it meets V
    weigh = squared_relu_weights if kernel == "relu2" else _softmax_weights
    mixed = (weigh(q.to(work), k.to(work), causal=causal) @ v.to(work)).to(v.dtype)
    return (u * mixed) @ weights.o, (k, v) if causal else None


def _queries_and_keys(x: Tensor, weights: Weights, start: int | None) -> list[Tensor]:
    """Scale and offset silu(X W_z), and turn it if the place of the first token is given: q, k (, q_lin, k_lin)."""
    maps, s = weights.gamma.shape
    z = F.silu(x @ weights.z)
    sources = [z] * maps if z.shape[-1] == s else z.split(s, -1)
    made = [z * gamma + beta for z, gamma, beta in zip(sources, weights.gamma, weights.beta, strict=True)]
    return made if start is None else [rotate(part, start) for part in made]


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Turn each pair of features (a, a + s/2) of token t by the angle (start + t) / 10000^(2a/s).

    Then q_i·k_j depends on i - j, besides the content, and eq. (13) of 11_flash does not hold. J. Su and others,
    RoFormer (arXiv 2104.09864), eq. 34.

    Parameters
    ----------
    x
        Shape (..., n, s) with even s.
    start
        Place of the first token.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"rotary positions need an even number of features, got {x.shape[-1]}")
    place = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float64)
    angle = place[:, None] * 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _tokens_seen(state: Any) -> int:
    if isinstance(state, ChunkState):
        return state.before + state.k.shape[-2]
    return 0 if state is None else state[0].shape[-2]


def _softmax_weights(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1)


class GatedAttentionUnit(nn.Module):
    """x + GAU(norm(x)): one layer, a block for `helpers.byte_model.ByteModel`.

    Parameters
    ----------
    width, expanded, shared
        d, e and s. Two layers with e = 2d have about the parameters of attention and feed-forward together.
    separate
        Give queries and keys a matrix each, in place of one Z for both: not a GAU, but a control.
    chunk_size, kernel, rotary
        As for `gated_attention_unit`.
    """

    def __init__(
        self,
        width: int,
        expanded: int,
        shared: int,
        *,
        chunk_size: int | None = None,
        kernel: Kernel = "relu2",
        rotary: bool = False,
        separate: bool = False,
    ) -> None:
        super().__init__()
        self.chunk_size, self.kernel, self.rotary = chunk_size, kernel, rotary
        maps = 2 if chunk_size is None else 4
        # Variance 1/(number of inputs): a normalised x gives U, V and Z of standard normal numbers, eq. (6).
        self.u, self.v = (nn.Parameter(torch.randn(width, expanded) / math.sqrt(width)) for _ in range(2))
        self.z = nn.Parameter(torch.randn(width, maps * shared if separate else shared) / math.sqrt(width))
        self.gamma, self.beta = nn.Parameter(torch.ones(maps, shared)), nn.Parameter(torch.zeros(maps, shared))
        self.o = nn.Parameter(torch.randn(expanded, width) / math.sqrt(expanded))
        self.norm = nn.LayerNorm(width)

    @property
    def weights(self) -> Weights:
        """The parameters of the unit."""
        return Weights(self.u, self.v, self.z, self.gamma, self.beta, self.o)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map (batch, n, width) to the same shape, causally, and the state before to the state after."""
        out, state = gated_attention_unit(
            self.norm(x),
            self.weights,
            kernel=self.kernel,
            chunk_size=self.chunk_size,
            rotary=self.rotary,
            state=state,
        )
        return x + out, state


# --- The trainings of the notebook

WIDTH, EXPANDED, SHARED = 64, 118, 32  # four units have as many parameters as 08's two layers, within 0.5 %


def flash_model(seed: int = 0, *, expanded: int = EXPANDED, **setting: Any) -> ByteModel:
    """Build a `ByteModel` of four units with `setting`, to be compared with ``byte_model.transformer``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ByteModel([GatedAttentionUnit(WIDTH, expanded, SHARED, **setting) for _ in range(4)], WIDTH)


def rotary_softmax(q: Tensor, k: Tensor, v: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """``byte_model.softmax_cached`` with rotary positions: the fair opponent of units that have them."""
    start = _tokens_seen(state)
    return softmax_cached(rotate(q, start), rotate(k, start), v, state)


class RowMeter:
    """Measures, after a training, how much and how many keys each query attends to; see `result`."""

    def __call__(self, step: int, model: nn.Module) -> None:
        """Do nothing while it trains."""

    @torch.no_grad()
    def result(self, model: ByteModel, *, length: int = 128, pieces: int = 64) -> dict[str, NDArray[np.float32]]:
        """Average over pieces of the held-back text, by layer and position; empty for all but quadratic relu² units.

        Returns
        -------
        dict
            "row_sum": sum of relu²(q·k/√s), not divided; "keys": its effective number of keys, (Σa)²/Σa². Each of
            shape (layers, length).
        """
        units = [unit for unit in model.blocks if isinstance(unit, GatedAttentionUnit)]
        if not units or any(unit.chunk_size is not None or unit.kernel != "relu2" for unit in units):
            return {}
        text, weights = load_bytes()[1], []
        starts = np.linspace(0, len(text) - length - 1, pieces).astype(int)

        def look(unit: GatedAttentionUnit, given: tuple[Tensor]) -> None:
            q, k = _queries_and_keys(unit.norm(given[0]), unit.weights, 0 if unit.rotary else None)
            weights.append(squared_relu_weights(q, k))

        hooks = [unit.register_forward_pre_hook(look) for unit in units]
        model(torch.from_numpy(text[starts[:, None] + np.arange(length)].astype(np.int64)))
        for hook in hooks:
            hook.remove()
        a = torch.stack(weights) * torch.arange(1, length + 1)[:, None]
        keys = a.sum(-1).square() / a.square().sum(-1).clamp(min=1e-30)
        return {"row_sum": a.sum(-1).mean(1).numpy(), "keys": keys.mean(1).numpy()}


# --- What it costs


class Cost(NamedTuple):
    """Of one sequence of n tokens; biases, norms, activations and the s scalars of gamma and beta are not counted."""

    parameters: int
    projections: int  # multiplications with weight matrices
    attention: int  # multiplications of tokens with tokens, and of tokens with states
    scores: int  # numbers in the matrices of scores


def transformer_cost(n: int, d: int, heads: int) -> Cost:
    """Count attention with `heads` heads and a feed-forward part of 4d. Eqs. (3)–(5) of 11_flash."""
    _require_positive(n=n, d=d, heads=heads)
    return Cost(12 * d**2, 12 * d**2 * n, 2 * n**2 * d, heads * n**2)


def gau_cost(n: int, d: int, e: int, s: int, *, chunk_size: int | None = None, layers: int = 2) -> Cost:
    """Count `layers` gated attention units, quadratic or causal in mixed chunks. Eqs. (3)–(5) and (12) of 11_flash.

    Parameters
    ----------
    n, d, e, s
        Tokens, and widths of the model, of U and V, of Q and K.
    chunk_size
        c; the last chunk may be shorter.
    """
    _require_positive(n=n, d=d, e=e, s=s, layers=layers)
    weights = 3 * d * e + d * s
    if chunk_size is None:
        pairs, far = n**2, 0
    else:
        _require_positive(chunk_size=chunk_size)
        whole, rest = divmod(n, chunk_size)
        pairs = whole * chunk_size**2 + rest**2
        written = (math.ceil(n / chunk_size) - 1) * chunk_size  # the last chunk is read by nobody
        far = (written + max(n - chunk_size, 0)) * s * e  # the first chunk has nothing to read
    return Cost(layers * weights, layers * n * weights, layers * (pairs * (s + e) + far), layers * pairs)


class Watch(TorchDispatchMode):
    """Sees every operation of torch inside ``with``, also on the device "meta", where tensors have no data.

    Parameters
    ----------
    n
        Number of tokens.

    Attributes
    ----------
    scores : int
        Numbers in all n × n results of matrix products.
    peak : int
        Most bytes of tensors made inside that were alive at one time; scratch space of an operation is not seen.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.scores, self.peak = n, 0, 0
        self._live, self._known = 0, set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and note its results."""
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                product = operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
                if product and tensor.shape[-2:] == (self.n, self.n):
                    self.scores += tensor.numel()
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:  # a view has the storage of its source
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


# --- What is asked of the arguments


def _require(given: dict[str, Tensor]) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating-point numbers, not {getattr(x, 'dtype', type(x))}")
        if x.ndim < 2 or x.shape[-2] == 0:
            raise ValueError(
                f"{name} must have shape (..., tokens, features) with at least one token, got {tuple(x.shape)}"
            )
    if len({x.dtype for x in given.values()}) > 1:
        types = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
        raise TypeError(f"all must have one type, got {types}")


def _require_state(state: ChunkState, k: Tensor, v: Tensor, c: int) -> None:
    if not isinstance(state, ChunkState):
        raise TypeError(f"an initial_state must be a ChunkState, not {type(state).__name__}")
    if state.k.shape[-1] != k.shape[-1] or state.v.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"the state has {state.k.shape[-1]} features of keys and {state.v.shape[-1]} of values, "
            f"but k has {k.shape[-1]} and v has {v.shape[-1]}"
        )
    if state.c != c:
        raise ValueError(f"the state comes from chunks of {state.c}, not of {c}")


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}")

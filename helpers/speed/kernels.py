"""Causal linear attention on a GPU: one Triton kernel, forward, backward and in two passes.

    o_i = sum_{j <= i} decay^(i-j) (q_i·k_j) v_j + decay^(i+1) S_0ᵀ q_i,   divided by the same sum with 1 for v_j

Chunk by chunk, as eq. (11) of 08_linear_attention: a small square inside the chunk, a state of size d × e for all that
came before. The state stays on the chip: v is read and o is written once, and q and k once for each block of columns of
v, of which 64 in bfloat16 make one block. The backward pass is three more runs of the kernel, eqs. (13)–(15) there, two
of them over the reversed sequence.

Where there are too few sequences to keep a GPU busy, each is cut into segments: a first pass finds the state that each
segment adds, a small matrix product turns these into the states that the segments start from, and a second pass treats
the segments as if they were sequences.

bfloat16 is multiplied as itself, float16 as tf32, which holds its 10 bits and does not overflow, and float32 as three
products of tf32, or as one where torch may do so too (`torch.set_float32_matmul_precision`). All sums are float32.

Needs Triton. With TRITON_INTERPRET=1 set before Triton is imported, everything runs on a CPU, slowly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from helpers.linear_attention import State, _decay_of, _require_state, _require_tensors

INTERPRETED = triton.knobs.runtime.interpret  # as Triton saw it when it was asked for the kernel below
MAX_FEATURES = 256
MAX_SEGMENTS = 65535  # CUDA's limit to the second axis of a grid


# Compiled once for all lengths, not again for those that are 1 or multiples of 16.
@triton.jit(do_not_specialize=["n", "segment_length", "segments"])
def _attend_kernel(
    q, k, v, x, start, rate, out, total, end,
    n, segment_length, segments,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, ROW: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, START: tl.constexpr,
    ONLY_STATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One program: BE columns of v, one segment of one sequence. Its state, D × BE numbers, stays on the chip.
    blocks = tl.cdiv(E, BE)
    columns, sequence, segment = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    i, a, b = tl.arange(0, CHUNK), tl.arange(0, BD), columns * BE + tl.arange(0, BE)
    has_a, has_b = (a < D)[None, :], (b < E)[None, :]
    q += sequence * n * D
    k += sequence * n * D
    v += sequence * n * E
    out += sequence * n * E
    x += sequence * n
    total += sequence * n

    # The state: S, beside it z, the same sum with ones for v, and below it r, the same sum with one more feature.
    block = (sequence * segments + segment) * ((D + 1) * (E + 1))
    at_s = block + a[:, None] * (E + 1) + b[None, :]
    at_z, at_r = block + a * (E + 1) + E, block + D * (E + 1) + b
    if START:
        S = tl.load(start + at_s, mask=(a < D)[:, None] & has_b, other=0.0)
        z = tl.load(start + at_z, mask=a < D, other=0.0)
        r = tl.load(start + at_r, mask=b < E, other=0.0)
    else:
        S = tl.zeros([BD, BE], tl.float32)
        z = tl.zeros([BD], tl.float32)
        r = tl.zeros([BE], tl.float32)
    if DECAY:
        log_decay = tl.load(rate + sequence)
        later = 0 if REVERSE else 1  # how often a state has faded when the first token of a chunk reads it
        fading = tl.exp2(log_decay * tl.maximum(i[:, None] - i[None, :], 0))
        fade_out = tl.exp2(log_decay * (i + later))

    first, last = segment * segment_length, tl.minimum((segment + 1) * segment_length, n)
    for begin in range(first, last, CHUNK):
        t = begin + i
        live = t < last
        if REVERSE:
            t = n - 1 - t
        has_t = live[:, None]
        k_c = tl.load(k + t[:, None] * D + a[None, :], mask=has_t & has_a, other=0.0).to(DOT)
        v_c = tl.load(v + t[:, None] * E + b[None, :], mask=has_t & has_b, other=0.0).to(DOT)
        if ROW:
            x_c = tl.load(x + t, mask=live, other=0.0)
        if not ONLY_STATE:
            q_c = tl.load(q + t[:, None] * D + a[None, :], mask=has_t & has_a, other=0.0).to(DOT)
            # Inside the chunk: a square, cut off above its diagonal.
            square = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
            if ROW == 1:
                square += x_c[:, None]
            if ROW == 2:
                square += x_c[None, :]
            square = tl.where(i[:, None] >= i[None, :], square, 0.0)
            if DECAY:
                square *= fading
            # All that came before the chunk: its state.
            before = tl.dot(q_c, S.to(DOT), input_precision=PRECISION)
            if ROW == 1:
                before += x_c[:, None] * r[None, :]
            if ROW == 2:
                before += r[None, :]
            if DECAY:
                before *= fade_out[:, None]
            result = before + tl.dot(square.to(DOT), v_c, input_precision=PRECISION)
            if NORMALIZE:
                # The column of ones: no block of columns has it, and each needs what comes of it.
                weight = tl.sum(q_c.to(tl.float32) * z[None, :], 1)
                if DECAY:
                    weight *= fade_out
                weight = tl.where(live, weight + tl.sum(square, 1), 1.0)
                result /= weight[:, None]
                if columns == 0:
                    tl.store(total + t, weight, mask=live)
            tl.store(out + t[:, None] * E + b[None, :], result.to(out.dtype.element_ty), mask=has_t & has_b)
        # The chunk joins the state.
        k_s = k_c
        if DECAY:
            length = tl.minimum(last - begin, CHUNK)
            fade_in = tl.where(live, tl.exp2(log_decay * tl.maximum(length - later - i, 0)), 0.0)
            k_s = (k_c * fade_in[:, None]).to(DOT)
            fade_all = tl.exp2(log_decay * length)
            S *= fade_all
            z *= fade_all
            r *= fade_all
        S += tl.dot(tl.trans(k_s), v_c, input_precision=PRECISION)
        z += tl.sum(k_s.to(tl.float32), 0)
        if ROW:
            y = x_c if ROW == 2 else live.to(tl.float32)
            if DECAY:
                y *= fade_in
            r += tl.sum(y[:, None] * v_c.to(tl.float32), 0)

    if ONLY_STATE or segment == segments - 1:
        at = 0 if ONLY_STATE else (sequence - sequence * segments - segment) * ((D + 1) * (E + 1))
        tl.store(end + at + at_s, S, mask=(a < D)[:, None] & has_b)
        tl.store(end + at + at_r, r, mask=b < E)
        if columns == 0:
            tl.store(end + at + at_z, z, mask=a < D)


@torch.library.custom_op("derive_check_play::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    start: Tensor | None,
    rate: Tensor | None,
    normalize: bool,
    reverse: bool,
    row: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel over flattened sequences; `linear_attention_triton` is what to call.

    Parameters
    ----------
    q, k, v
        Shapes (sequences, n, d), (sequences, n, d) and (sequences, n, e).
    x
        Shape (sequences, n), float32: one more feature, of q if `row` is 1, of k if it is 2, while the other of the two
        has 1 there. Not read if `row` is 0.
    start
        State before the first token, shape (sequences, d + 1, e + 1), float32: S, beside it z, below it r.
    rate
        log2 of the decay, shape (sequences,), float32.
    normalize
        Divide by the sum of the weights.
    reverse
        From the last token to the first. A state then counts as decayed when the next token reads it.
    segments
        Into how many pieces a sequence is cut; 0 for a choice by the shape.

    Returns
    -------
    out : Tensor, shape (sequences, n, e)
    total : Tensor, shape (sequences, n)
        Sums of the weights, if `normalize`.
    end : Tensor, shape (sequences, d + 1, e + 1)
        State after the last token.
    """
    q, k, v, x = (tensor.contiguous() for tensor in (q, k, v, x))
    start = None if start is None else start.contiguous()
    sequences, n, d, e = *q.shape, v.shape[-1]
    held = _choose_launch(d, e, q.dtype)
    blocks = triton.cdiv(e, held.columns)
    segments = segments or _choose_segments(n, sequences * blocks, q.device)
    length = triton.cdiv(triton.cdiv(n, segments), held.chunk) * held.chunk
    segments = triton.cdiv(n, length)
    out, total = v.new_empty(sequences, n, e, dtype=q.dtype), x.new_empty(sequences, n if normalize else 0)
    end = x.new_zeros(sequences, d + 1, e + 1)
    exact = q.dtype == k.dtype == v.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    constants = {
        "D": d, "E": e, "BD": held.features, "BE": held.columns, "CHUNK": held.chunk,
        "REVERSE": reverse, "ROW": row, "DECAY": rate is not None,
        "DOT": tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32, "PRECISION": "tf32x3" if exact else "tf32",
        "num_warps": held.warps, "num_stages": held.stages,
    }  # fmt: skip

    def launch(start: Tensor | None, end: Tensor, segments: int, only_state: bool) -> None:
        grid = (sequences * blocks, segments - 1 if only_state else segments)
        # An argument that a variant does not read needs a value all the same.
        _attend_kernel[grid](
            q, k, v, x, end if start is None else start, x if rate is None else rate, out, total, end,
            n, length, grid[1], NORMALIZE=normalize, START=start is not None, ONLY_STATE=only_state, **constants,
        )  # fmt: skip

    # Triton launches on the current GPU, which need not be the tensors'; and autocast would round the states.
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        if segments > 1:
            added = x.new_zeros(sequences, segments - 1, d + 1, e + 1)
            launch(None, added, segments, True)
            start = _states_before(added, start, rate, length)
        launch(start, end, segments, False)
    return out, total, end


@attend.register_fake
def _(q, k, v, x, start, rate, normalize, reverse, row, segments):
    sequences, n, d, e = *q.shape, v.shape[-1]
    total = x.new_empty(sequences, n if normalize else 0)
    return v.new_empty(sequences, n, e, dtype=q.dtype), total, x.new_empty(sequences, d + 1, e + 1)


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, start, rate, ctx.normalize, ctx.reverse, ctx.row, ctx.segments = inputs
    out, total = output[:2] if ctx.normalize else (None, None)
    ctx.save_for_backward(q, k, v, start, rate, out, total)


def _backward(ctx: Any, d_out: Tensor, d_total: Tensor, d_end: Tensor) -> tuple:
    """Eqs. (13)–(15) of 08_linear_attention. The normaliser is one more feature of the gradient."""
    if ctx.reverse or ctx.row:
        raise NotImplementedError("a gradient of the gradient is not offered: use helpers.linear_attention for it")
    q, k, v, start, rate, out, total = ctx.saved_tensors
    if ctx.normalize:
        # o = N / w, so a change of N weighs g = dO / w, and one of w weighs x = -(dO·o) / w.
        x = -(d_out.float() * out.float()).sum(-1) / total
        g = d_out.float() / total[..., None]
        if d_out.dtype == torch.bfloat16:
            g = g.bfloat16()  # not to float16, where 1 / w can be too small
    else:
        x, g = d_out.new_zeros(d_out.shape[:-1], dtype=torch.float32), d_out

    def run(a: Tensor, b: Tensor, c: Tensor, begin: Tensor | None, reverse: bool, row: int) -> tuple[Tensor, Tensor]:
        result, _, end = attend(a, b, c, x, begin, rate, False, reverse, row, ctx.segments)
        return result, end

    d_q, _ = run(g, v, k, None if start is None else start.mT, False, 1)
    d_k, d_begin = run(v, g, q, d_end.mT, True, 2)
    d_v, _ = run(k, q, g, d_end, True, 0)
    d_start = None if start is None else F.pad(d_begin.mT[:, :-1], (0, 0, 0, 1))
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, d_start, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_remember)


def _states_before(added: Tensor, start: Tensor | None, rate: Tensor | None, length: int) -> Tensor:
    """States that the segments start from: what the start and the segments before leave, faded. (seq, segments, …)."""
    sequences, segments, *shape = added.shape
    if start is None:
        start = torch.zeros_like(added[:, 0])
    sources = torch.cat([start[:, None], added], 1).flatten(2)
    age = torch.arange(segments + 1, device=added.device)
    age = (age[:, None] - age).to(torch.float32) * length
    weights = (age >= 0).float() if rate is None else torch.where(age >= 0, torch.exp2(rate[:, None, None] * age), 0.0)
    return (weights @ sources).reshape(sequences, segments + 1, *shape)


class _Launch(NamedTuple):
    """What one program holds, and how it is compiled."""

    features: int
    columns: int
    chunk: int
    warps: int
    stages: int


# For up to 64, 128 and 256 features. Found by compiling for compute capabilities 8.0, 8.9 and 9.0: with these, the
# shared memory fits, and a thread spills less than 700 bytes of its registers, but in float32 with 256 features.
_LAUNCHES = {
    torch.bfloat16: ((64, 64, 4, 3), (64, 64, 8, 3), (32, 32, 8, 2)),
    torch.float16: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    torch.float32: ((32, 32, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
}


def _choose_launch(d: int, e: int, dtype: torch.dtype) -> _Launch:
    features = max(16, triton.next_power_of_2(d))  # tl.dot asks for powers of two, from 16 on
    columns, *others = _LAUNCHES[dtype][(features > 64) + (features > 128)]
    return _Launch(features, min(columns, max(16, triton.next_power_of_2(e))), *others)


def _choose_segments(n: int, programs: int, device: torch.device) -> int:
    """One, the fused pass, if each multiprocessor has a program; else two programs each, of 512 tokens or more."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if not 0 < programs < processors:
        return 1
    return max(1, min(triton.cdiv(2 * processors, programs), n // 512))


def _rate_of(decay: float | Tensor, leading: torch.Size, like: Tensor) -> Tensor:
    """log2 of the decay, one number a sequence."""
    if isinstance(decay, Tensor):
        if decay.requires_grad or not torch.compiler.is_compiling():  # a graph cannot ask what numbers there are
            decay = _decay_of(decay, True, like)
        rate = decay.to(like.device, torch.float32).log2()
    elif 0 <= decay <= 1:  # asked here and not of a tensor, for which the CPU would have to wait for the GPU
        rate = like.new_full((), decay, dtype=torch.float32).log2()
    else:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    try:
        # 2^-10000 is 0, and unlike log2(0) it stays 1 when raised to the power 0.
        return rate.clamp(min=-1e4).expand(leading).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(
            f"decay of shape {tuple(rate.shape)} does not broadcast to the leading axes {tuple(leading)}"
        ) from None


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: bool = True,
    decay: float | Tensor | None = None,
    initial_state: State | None = None,
    segments: int | None = None,
) -> tuple[Tensor, State]:
    """Compute causal linear attention of given features with the kernel above.

    The same function as `helpers.linear_attention.linear_attention` with `feature_map=None`, and differentiable once by
    q, k, v and the initial state. Works under torch.compile, where the values in a tensor `decay` are not looked at.

    Parameters
    ----------
    q, k, v
        Shapes (..., n, d), (..., n, d) and (..., n, e), leading axes that broadcast; d and e at most 256; float32,
        float16 or bfloat16, on a GPU.
    normalize, decay, initial_state
        As there.
    segments
        Into how many pieces a sequence is cut for the two-pass form; 1 for the fused pass, None for a choice by shape.

    Returns
    -------
    output : Tensor, shape (..., n, e)
    state : State
        After the last token, in float32.

    Raises
    ------
    ValueError, TypeError
        Shapes, types, devices or settings that do not fit.
    """
    _require_tensors(q, k, v, True)
    if initial_state is not None:
        _require_state(initial_state, k.shape[-1], v.shape[-1])
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the kernel takes float32, float16 or bfloat16, not {q.dtype}")
    devices = [x.device for x in (q, k, v, *(initial_state or ()))]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, v and the state must be on one device, got {', '.join(map(str, devices))}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the kernel runs on a CUDA GPU, and q is on {q.device}: move it there, or use helpers.linear_attention; "
            "for tests, TRITON_INTERPRET=1 in the environment before Python starts runs it anywhere, slowly"
        )
    n, d, e = *q.shape[-2:], v.shape[-1]
    if not 1 <= d <= MAX_FEATURES or not 1 <= e <= MAX_FEATURES:
        raise ValueError(f"the kernel takes 1 to {MAX_FEATURES} features, got {d} of q and k and {e} of v")
    if n * max(d, e, 2) >= 2**31:  # positions within a sequence are 32-bit numbers
        raise ValueError(f"one sequence of {n} tokens with {max(d, e)} features is too long for the kernel")
    if segments is not None and not (isinstance(segments, int) and 1 <= segments <= MAX_SEGMENTS):
        raise ValueError(f"segments must be a whole number from 1 to {MAX_SEGMENTS} or None, not {segments!r}")
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    start = None
    if initial_state is not None:
        try:
            leading = torch.broadcast_shapes(leading, initial_state.z.shape[:-1])
        except RuntimeError:
            shapes = " and ".join(str(tuple(x.shape)) for x in initial_state)
            raise ValueError(f"a state of shapes {shapes} does not broadcast with the axes {tuple(leading)}") from None
        start = torch.cat([initial_state.s, initial_state.z[..., None]], -1).float()
        start = F.pad(start, (0, 0, 0, 1)).expand(*leading, d + 1, e + 1).reshape(-1, d + 1, e + 1)
    rate = None if decay is None else _rate_of(decay, leading, q)
    q, k, v = (x.expand(*leading, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    unread = q.new_empty(len(q), 0, dtype=torch.float32)
    out, _, end = attend(q, k, v, unread, start, rate, normalize, False, 0, segments or 0)
    end = end.reshape(*leading, d + 1, e + 1)
    return out.reshape(*leading, n, e), State(end[..., :-1, :-1], end[..., :-1, -1])

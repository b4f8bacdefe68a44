"""The Triton kernel against the definition in float64, every variant of it, and compiled for GPUs that are not here.

On a machine with a CUDA GPU all of it runs there. Without one it runs on the CPU, in Triton's interpreter, where
bfloat16 products are wrong (Triton stores them as integers) and so are not tried.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed; it is optional and there is none for this system")

ON_GPU = torch.cuda.is_available()
# Triton decides whether it interprets when it is first imported, and in a run of many files another one has imported it
# by then (torch's counter of operations does so). So without a GPU this file runs itself again, in a fresh process with
# TRITON_INTERPRET=1: the last test below. To run a single test, set the variable by hand.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and not ON_GPU
if ON_GPU or INTERPRETING:
    from helpers.linear_attention import State, linear_attention
    from helpers.speed import kernels
    from helpers.speed.kernels import attend, linear_attention_triton

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if ON_GPU else "cpu"
FLOAT32 = torch.float32
# Errors of a result, as a share of its largest number. The GPU multiplies float32 as three tf32, float16 as one.
TOLERANCES = {torch.float32: 2e-5 if ON_GPU else 3e-6, torch.float16: 2e-3}
if ON_GPU:
    TOLERANCES[torch.bfloat16] = 2e-2
DTYPES = list(TOLERANCES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def features(*shape, seed=0, dtype=FLOAT32):
    """Positive, so that the weights are, and already rounded to the type."""
    return (normal(*shape, seed=seed).abs() + 0.1).to(dtype)


def qkv(*leading, n=20, d=16, e=16, dtype=FLOAT32, seed=0):
    q, k = (features(*leading, n, d, seed=seed + i, dtype=dtype) for i in (0, 1))
    return q, k, normal(*leading, n, e, seed=seed + 2).to(dtype)


def a_state(*leading, d=16, e=16, seed=5):
    return State(normal(*leading, d, e, seed=seed).float(), features(*leading, d, seed=seed + 1))


def by_definition(q, k, v, state=None, decay=None, normalize=True):
    """All n × n weights in float64; the last state as a sum over all tokens."""
    q, k, v = (x.double() for x in (q, k, v))
    n = q.shape[-2]
    gamma = torch.ones((), device=q.device).double() if decay is None else torch.as_tensor(decay, device=q.device)
    gamma = gamma.double()[..., None, None]
    i = torch.arange(n, device=q.device)
    weights = torch.where(i[:, None] >= i, q @ k.mT, 0.0) * gamma ** (i[:, None] - i).clamp(min=0)
    left = gamma ** (n - 1 - i)[:, None]
    out, total = weights @ v, weights.sum(-1, keepdim=True)
    s, z = (k * left).mT @ v, (k * left).sum(-2)
    if state is not None:
        first = q * gamma ** (i + 1)[:, None]
        out, total = out + first @ state.s.double(), total + first @ state.z.double()[..., None]
        s, z = s + gamma**n * state.s.double(), z + gamma[..., 0] ** n * state.z.double()
    return out / total if normalize else out, s.expand(*out.shape[:-2], *s.shape[-2:]), z.expand(*out.shape[:-2], -1)


def close(ours, expected, tol, what=""):
    assert ours.shape == expected.shape, what
    assert torch.isfinite(ours).all(), what
    error = (ours.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error <= tol, f"{what}: {error:.1e} > {tol}"


def compare(q, k, v, state=None, *, tol=None, **options):
    """Outputs, last state and all gradients, with weights on the outputs and on the last state."""
    tol = tol or TOLERANCES[v.dtype]
    results = []
    for run in (linear_attention_triton, by_definition):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *(state or ()))]
        start = State(*leaves[3:]) if state else None
        if run is by_definition:
            result = by_definition(*leaves[:3], start, **{a: b for a, b in options.items() if a != "segments"})
        else:
            out, end = run(*leaves[:3], initial_state=start, **options)
            result = (out, *end)
            assert out.dtype == v.dtype and end.s.dtype == end.z.dtype == FLOAT32
        loss = sum((x.double() * normal(*x.shape, seed=9 + i)).sum() for i, x in enumerate(result))
        results.append((*result, *torch.autograd.grad(loss, leaves)))
    for name, ours, expected in zip(("out", "s", "z", "dq", "dk", "dv", "ds", "dz"), *results, strict=False):
        if name[0] == "d" and len(q) and not expected.abs().max() > 1e-9:  # one feature, say: q divides out
            assert ours.abs().max() < 1e-3, name
        else:
            # A gradient that the normaliser nearly cancels, or that has passed through the rounded output.
            close(ours, expected, tol * (4 if name[0] == "d" else 1), name)
    return results[0]


# --- Every variant against the definition


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "normalize, with_state, decay, segments",
    [
        (True, False, None, 1),
        (True, True, None, 2),
        (True, True, 0.9, 1),
        (True, True, "heads", 2),
        (True, False, "heads", 1),
        (False, False, None, 2),
        (False, True, "heads", 1),
        (False, True, 0.9, 2),
    ],
)
def test_every_variant(dtype, normalize, with_state, decay, segments):
    q, k, v = qkv(2, n=45, d=12, e=20, dtype=dtype)
    state = a_state(2, d=12, e=20) if with_state else None
    decay = torch.tensor([0.0, 0.7]) if decay == "heads" else decay
    compare(q, k, v, state, decay=decay, normalize=normalize, segments=segments)


@pytest.mark.parametrize(
    "n, segments",  # chunks of float32 have 32 tokens
    [(1, None), (1, 50), (2, 1), (31, 2), (32, 1), (33, 2), (64, 2), (65, None), (65, 50), (130, 2), (130, 3)],
)
def test_lengths_around_the_chunks(n, segments):
    compare(*qkv(n=n, d=5, e=3), a_state(d=5, e=3), decay=0.95, segments=segments)


@pytest.mark.parametrize(
    "d, e", [(1, 1), (1, 7), (7, 1), (15, 17), (16, 64), (64, 16), (65, 33), (48, 128), (129, 20), (256, 18)]
)
def test_numbers_of_features(d, e):
    compare(*qkv(n=37, d=d, e=e), a_state(d=d, e=e), decay=0.8, segments=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest(dtype):
    compare(*qkv(n=10, d=256, e=256, dtype=dtype))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 40),
    e=st.integers(1, 40),
    segments=st.integers(1, 5),
    decay=st.none() | st.floats(0, 1),
    normalize=st.booleans(),
    with_state=st.booleans(),
)
def test_anything(n, d, e, segments, decay, normalize, with_state):
    state = a_state(2, d=d, e=e) if with_state else None
    out, s, z, *_ = compare(
        *qkv(2, n=n, d=d, e=e, seed=n), state, decay=decay, normalize=normalize, segments=segments, tol=1e-5
    )
    # And what the chunked torch version says.
    expected = linear_attention(
        *qkv(2, n=n, d=d, e=e, seed=n), feature_map=None, decay=decay, normalize=normalize, initial_state=state
    )
    for ours, theirs in zip((out, s, z), (expected[0], *expected[1]), strict=True):
        close(ours, theirs, 1e-4 if ON_GPU else 1e-5)


def test_q_may_be_signed_without_the_normaliser():
    q, k, v = (normal(2, 70, 9, seed=i).float() for i in range(3))
    compare(q, k, v, State(normal(2, 9, 9, seed=3).float(), normal(2, 9, seed=4).float()), normalize=False, segments=2)


# --- Axes and memory


@pytest.mark.parametrize(
    "shapes, decay",
    [
        (((), (), ()), None),
        (((2,), (2,), (2,)), [0.5, 0.9]),
        (((2, 3), (2, 3), (2, 3)), [0.5, 0.9, 1.0]),
        (((2, 3), (2, 1), (2, 1)), [[0.5], [0.9]]),  # keys and values that heads share
        (((), (3,), (2, 1)), [0.5, 0.9, 1.0]),
    ],
)
def test_leading_axes_broadcast(shapes, decay):
    q, k = (features(*shape, 35, 6, seed=i) for i, shape in enumerate(shapes[:2]))
    v = normal(*shapes[2], 35, 4, seed=3).float()
    leading = torch.broadcast_shapes(*shapes)
    decay = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    out, s, z, *_ = compare(q, k, v, a_state(*leading[1:], d=6, e=4), decay=decay, segments=1)
    assert out.shape == (*leading, 35, 4) and s.shape == (*leading, 6, 4) and z.shape == (*leading, 6)


def test_a_state_may_have_more_axes_than_the_tokens():
    out, _s, z, *_ = compare(*qkv(n=9), a_state(2, 3), decay=0.5)
    assert out.shape == (2, 3, 9, 16) and z.shape == (2, 3, 16)


def test_memory_in_any_order():
    tokens_last = [x.mT.contiguous().mT for x in qkv(2, n=40, d=8, e=6)]
    every_other = [torch.stack([x, 7 * x], -1).flatten(-2)[..., ::2] for x in qkv(2, n=40, d=8, e=6)]
    state = a_state(2, d=8, e=6)
    for tensors in (tokens_last, every_other):
        assert not any(x.is_contiguous() for x in tensors)
        compare(*tensors, State(state.s.mT.contiguous().mT, state.z), decay=0.9, segments=1)


def test_gradients_of_an_expanded_cotangent():
    q, k, v = (x.requires_grad_() for x in qkv(2, n=33))
    ours = torch.autograd.grad(linear_attention_triton(q, k, v)[0].sum(), (q, k, v))
    for a, b in zip(ours, torch.autograd.grad(by_definition(q, k, v)[0].sum(), (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_an_empty_batch():
    q, k, v = (x.requires_grad_() for x in qkv(0, n=9))
    out, state = linear_attention_triton(q, k, v, decay=0.5, segments=2)
    assert out.shape == (0, 9, 16) and state.s.shape == (0, 16, 16)
    assert torch.autograd.grad(out.sum() + state.z.sum(), q)[0].shape == q.shape


# --- What defines it


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_sequence_may_be_split_anywhere(decay):
    q, k, v = qkv(2, n=70, d=8, e=6)
    whole, end = linear_attention_triton(q, k, v, decay=decay)
    for cut in (1, 32, 45):
        first, state = linear_attention_triton(*(x[:, :cut] for x in (q, k, v)), decay=decay)
        second, last = linear_attention_triton(*(x[:, cut:] for x in (q, k, v)), decay=decay, initial_state=state)
        close(torch.cat([first, second], 1), whole, TOLERANCES[FLOAT32])
        close(last.s, end.s, TOLERANCES[FLOAT32])
        close(last.z, end.z, TOLERANCES[FLOAT32])


@pytest.mark.parametrize("decay, sequences", [(None, 2), (0.99, 1)])
def test_segments_do_not_change_the_result(decay, sequences):
    tensors = qkv(sequences, n=150, d=8, e=20)
    whole, end = linear_attention_triton(*tensors, decay=decay, segments=1)
    for segments in (2, 3, kernels.MAX_SEGMENTS):
        out, state = linear_attention_triton(*tensors, decay=decay, segments=segments)
        for ours, expected in zip((out, *state), (whole, *end), strict=True):
            close(ours, expected, TOLERANCES[FLOAT32])


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_later_tokens_change_nothing(segments, normalize):
    tensors = qkv(n=100, d=8, e=6)
    out, _ = linear_attention_triton(*tensors, decay=0.9, normalize=normalize, segments=segments)
    for cut in (1, 32, 50, 99):
        changed = [torch.cat([x[:cut], 1000 * features(*x[cut:].shape, seed=8)]) for x in tensors]
        again, _ = linear_attention_triton(*changed, decay=0.9, normalize=normalize, segments=segments)
        assert torch.equal(again[:cut], out[:cut])
        assert not torch.equal(again[cut:], out[cut:])


def test_what_lies_beyond_the_last_token_is_not_read():
    """The tokens of another sequence, huge ones, follow in memory."""
    tensors = [torch.cat([x, torch.full_like(x, 1e9)]) for x in qkv(1, n=45, d=7, e=5)]
    out, state = linear_attention_triton(*tensors, decay=0.9)
    expected, s, z = by_definition(*(x[:1] for x in tensors), decay=0.9)
    for ours, theirs in zip((out[:1], state.s[:1], state.z[:1]), (expected, s, z), strict=True):
        close(ours, theirs, TOLERANCES[FLOAT32])


def test_float16_does_not_overflow_with_the_normaliser():
    q, k, v = qkv(1, n=150, d=16, e=8, dtype=torch.float16)
    q, k, v = 80 * q, 80 * k, 100 * v
    weights, state = q.double() @ k.double().mT, k.double().mT @ v.double()
    assert weights.max() > 65504 and state.abs().max() > 65504
    # Nor does what is divided by such a sum vanish on the way to the gradients, which float16 can hold.
    compare(q, k, v, segments=2)


def test_a_long_memory_does_not_lose_its_weight():
    """With a decay of 1 - 1e-4 the powers come from a logarithm: its rounding must not add up over 900 tokens."""
    q, k, v = qkv(n=900, d=4, e=4)
    ours, _ = linear_attention_triton(q, k, v, decay=1 - 1e-4, segments=2)
    close(ours, by_definition(q, k, v, decay=torch.tensor(1 - 1e-4).float())[0], max(1e-5, TOLERANCES[FLOAT32]))


# --- Under torch: gradients, compile, autocast, precision


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in qkv(2, n=20, d=5, e=3))
    x, start, rate = features(2, 20), features(2, 6, 4).requires_grad_(), -features(2)
    unread = x[:, :0]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the rest is test_torch_compile
    torch.library.opcheck(attend, (q, k, v, unread, start, rate, True, False, 0, 2), test_utils=checks)
    torch.library.opcheck(attend, (q, k, v, unread, None, None, False, False, 0, 0), test_utils=checks)
    # As in the backward pass, which has no gradient.
    inputs = [tensor.detach() for tensor in (q, k, v, x, start, rate)]
    torch.library.opcheck(attend, (*inputs, False, True, 2, 2), test_utils=checks)


@pytest.mark.parametrize("decay", [0.9, "heads"])
def test_torch_compile(decay):
    decay = torch.tensor([0.5, 0.9], device=DEVICE) if decay == "heads" else decay

    def loss(q, k, v, s, z):
        out, state = linear_attention_triton(q, k, v, decay=decay, initial_state=State(s, z), segments=2)
        return (out**2).sum() + (state.s * s).sum() + (state.z * z).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in (*qkv(2, n=40, d=8, e=8), *a_state(2, d=8, e=8))]
        value = run(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for ours, expected in zip(results[1], results[0], strict=True):
        close(ours, expected, 1e-6)


def test_compiled_once_for_all_lengths():
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: linear_attention_triton(*x)[0], fullgraph=True, dynamic=True, backend=count)
    for n in (20, 41, 75):
        close(compiled(*qkv(n=n)), linear_attention_triton(*qkv(n=n))[0], 1e-6)
    assert count.frame_count == 1


def test_autocast_does_not_round_the_states():
    tensors = qkv(2, n=150, d=8, e=6)
    plain = linear_attention_triton(*tensors, decay=0.9, segments=3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = linear_attention_triton(*tensors, decay=0.9, segments=3)
    for ours, expected in zip((inside[0], *inside[1]), (plain[0], *plain[1]), strict=True):
        assert torch.equal(ours, expected)


def test_a_gradient_of_the_gradient_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv(n=9))
    grads = torch.autograd.grad(linear_attention_triton(q, k, v)[0].sum(), (q, k, v), create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match=r"gradient of the gradient.*linear_attention"):
            torch.autograd.grad(grad.sum(), q, retain_graph=True)


def test_gradient_by_the_state_alone_and_by_one_input_alone():
    for i in range(3):
        tensors = [x.requires_grad_(i == j) for j, x in enumerate(qkv(2, n=40))]
        _, state = linear_attention_triton(*tensors, decay=0.9)
        _, s, _z = by_definition(*tensors, decay=0.9)
        if i:
            close(torch.autograd.grad(state.s.sum(), tensors[i])[0], torch.autograd.grad(s.sum(), tensors[i])[0], 1e-5)
        else:  # the state does not depend on q
            assert not torch.autograd.grad(state.s.sum(), tensors[0])[0].any()


def test_nothing_is_kept_that_the_backward_pass_does_not_need():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_attention_triton(*(x.requires_grad_() for x in qkv(1, n=40, d=3, e=5)), normalize=False)
    assert sorted(kept) == [(1, 40, 3), (1, 40, 3), (1, 40, 5)]


@pytest.fixture
def launches(monkeypatch):
    """What the kernel is started with."""
    started, kernel = [], kernels._attend_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append({**options, "grid": grid}) or kernel[grid](*args, **options)

    monkeypatch.setattr(kernels, "_attend_kernel", Recorder())
    return started


def use_newer_setting(name):
    torch.backends.cuda.matmul.fp32_precision = name


@pytest.mark.parametrize(
    "use, setting, precision",
    [
        (torch.set_float32_matmul_precision, "highest", "tf32x3"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (use_newer_setting, "ieee", "tf32x3"),
        (use_newer_setting, "tf32", "tf32"),
    ],
)
def test_precision_follows_torch(launches, use, setting, precision):
    try:
        use(setting)
        linear_attention_triton(*qkv(n=3))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [x["PRECISION"] for x in launches] == [precision]


def test_float16_takes_one_product_in_the_backward_pass_too(launches):
    q, k, v = (x.requires_grad_() for x in qkv(n=3, dtype=torch.float16))
    linear_attention_triton(q, k, v)[0].sum().backward()
    assert [x["PRECISION"] for x in launches] == ["tf32"] * 4


def test_segments_and_blocks_make_the_grid(launches):
    linear_attention_triton(*qkv(3, n=90, d=16, e=80), segments=3)
    columns = launches[0]["BE"]
    blocks = math.ceil(80 / columns)
    assert blocks > 1  # else this shows nothing
    assert [(x["grid"], x["ONLY_STATE"]) for x in launches] == [((3 * blocks, 2), True), ((3 * blocks, 3), False)]


def test_the_launch_is_on_the_gpu_of_the_tensors(monkeypatch):
    """Triton launches on the current GPU. With one GPU, or none, all that can be seen is that q's is made current."""
    asked = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x.shape) or device_of(x))
    linear_attention_triton(*qkv(2, n=3, d=5))
    assert asked == [(2, 3, 5)]


@pytest.mark.parametrize(
    "n, programs, expected",
    [(100000, 132, 1), (100000, 131, 3), (100000, 1, 195), (1000000, 1, 264), (500, 1, 1), (1024, 8, 2), (9, 0, 1)],
)
def test_choice_of_segments(monkeypatch, n, programs, expected):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert kernels._choose_segments(n, programs, torch.device("cuda", 0)) == expected


# --- What is refused


@pytest.mark.parametrize(
    "change, options, error, message",
    [
        ({"q": torch.ones(9, 16).double()}, {}, TypeError, "must have one type, got torch.float64"),
        ({x: torch.ones(9, 16).double() for x in "qkv"}, {}, TypeError, "float32, float16 or bfloat16, not .*float64"),
        ({"k": torch.ones(9, 16).int()}, {}, TypeError, "k must be a tensor of floating-point numbers"),
        ({"v": [1.0]}, {}, TypeError, "v must be a tensor of floating-point numbers"),
        ({"q": torch.ones(9, 15)}, {}, ValueError, "q has 15 features and k has 16"),
        ({"v": torch.ones(8, 16)}, {}, ValueError, "9 keys and 8 values"),
        ({"q": torch.ones(8, 16)}, {}, ValueError, "as many queries as keys, got 8 and 9"),
        ({x: torch.ones(0, 16) for x in "qkv"}, {}, ValueError, "at least one token"),
        ({"q": torch.ones(2, 9, 16), "k": torch.ones(3, 9, 16)}, {}, ValueError, "do not broadcast"),
        ({x: torch.ones(9, 257) for x in "qk"}, {}, ValueError, "1 to 256 features, got 257 of q and k and 16 of v"),
        ({"v": torch.ones(9, 300)}, {}, ValueError, "1 to 256 features, got 16 of q and k and 300 of v"),
        ({"v": torch.ones(9, 0)}, {}, ValueError, "1 to 256 features"),
        (
            {x: torch.ones(1, 1, device=DEVICE).expand(2**23, 256) for x in "qkv"},
            {},
            ValueError,
            "8388608 tokens .* is too long",
        ),
        ({x: torch.ones(1, 1, device=DEVICE).expand(2**30, 1) for x in "qkv"}, {}, ValueError, "is too long"),
        ({"k": torch.ones(9, 16, device="meta")}, {}, ValueError, "on one device, got .*, meta, "),
        ({}, {"segments": 0}, ValueError, "from 1 to 65535 or None, not 0"),
        ({}, {"segments": 65536}, ValueError, "from 1 to 65535 or None, not 65536"),
        ({}, {"segments": 1.5}, ValueError, "or None, not 1.5"),
        ({}, {"decay": 1.5}, ValueError, r"decay must lie in \[0, 1\], got 1.5"),
        ({}, {"decay": -0.1}, ValueError, r"decay must lie in \[0, 1\], got -0.1"),
        ({}, {"decay": math.nan}, ValueError, r"decay must lie in \[0, 1\], got nan"),
        ({}, {"decay": torch.tensor([0.5, 1.5])}, ValueError, r"decay must lie in \[0, 1\]"),
        ({}, {"decay": torch.tensor([0.5, 0.6])}, ValueError, r"decay of shape \(2,\) .* leading axes \(\)"),
        ({}, {"decay": torch.tensor(0.5, requires_grad=True)}, ValueError, "decay gets no gradient"),
    ],
)
def test_errors(change, options, error, message):
    tensors = dict(zip("qkv", qkv(n=9), strict=True))
    tensors.update({a: b.to(DEVICE) if getattr(b, "is_cpu", False) else b for a, b in change.items()})
    with pytest.raises(error, match=message):
        linear_attention_triton(**tensors, **options)


def test_errors_of_states():
    tensors, good = qkv(3, n=9), a_state(3)
    for state, error, message in (
        ((good.s, good.z), TypeError, r"must be a State\(s, z\), not tuple"),
        (a_state(3, d=8), ValueError, r"s of shape \(..., 16, 16\)"),
        (a_state(2), ValueError, r"shapes \(2, 16, 16\) and \(2, 16\) .* the axes \(3,\)"),
        (State(good.s.to("meta"), good.z), ValueError, "the state must be on one device, got .*, meta, "),
    ):
        with pytest.raises(error, match=message):
            linear_attention_triton(*tensors, initial_state=state)


def test_the_cpu_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"runs on a CUDA GPU, and q is on cpu.*TRITON_INTERPRET=1"):
        linear_attention_triton(*(x.cpu() for x in qkv(n=3)))


# --- Compiled for GPUs that need not be here

# The wrapper runs as it does on a GPU, but for the launches: these only compile. What is compiled is so what is run.
COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from helpers.speed import kernels

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
    get_current_device = staticmethod(lambda: capability)
    get_current_stream = staticmethod(lambda device=None: 0)

class OnlyCompile:
    def __getitem__(self, grid):
        return lambda *args, **options: built.append(kernel.warmup(*args, grid=grid, **options))

kernel = kernels._attend_kernel
driver.set_active(Driver())
kernels._attend_kernel, kernels.INTERPRETED = OnlyCompile(), True
for capability, d, lengths, options in json.loads(sys.argv[1]):
    built = []
    for n in lengths:
        q, k, v = (torch.zeros(2, n, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        kernels.linear_attention_triton(q, k, v, **options)[0].sum().backward()
    built = {id(b): b for b in built}.values()
    print(json.dumps([(b.metadata.shared, b.asm["ptx"].count("mma"), len(b.asm["cubin"])) for b in built]))
"""
# Compute capability, features, lengths, how it is called; and how many kernels that takes: forward, and three times
# backward. Another length takes no others.
GPUS = [(80, 128, [200, 1, 32], {}, 4), (90, 64, [200], {"decay": 0.9, "segments": 2}, 8)]


def test_compiles_for_gpus(tmp_path):
    nvidia = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if not list(nvidia.glob("ptxas*")):
        pytest.skip("this Triton comes without ptxas, NVIDIA's assembler")
    env = {a: b for a, b in os.environ.items() if a != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([case[:4] for case in GPUS])],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (capability, *_, kernels_needed), line in zip(GPUS, done.stdout.splitlines(), strict=True):
        built = json.loads(line)
        assert len(built) == kernels_needed
        # What a block of threads may use: 99 KB where the compute capability is 8.6 or 8.9, 227 KB where it is 9.0.
        assert max(shared for shared, _, _ in built) <= (99 if capability < 90 else 227) * 1024
        assert all(products and size for _, products, size in built)  # on tensor cores


# --- Without a GPU


if not (ON_GPU or INTERPRETING):
    for _name in [name for name in globals() if name.startswith("test_") and name != "test_compiles_for_gpus"]:
        del globals()[_name]

    def test_all_of_these_in_the_interpreter():
        # Without the plugins for notebooks, which take seconds to import.
        options = ["-q", "--tb=short", "--noconftest", "-o", "addopts=", "-p", "no:nbval", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-k", "not test_compiles_for_gpus", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90 and "skipped" not in done.stdout, done.stdout

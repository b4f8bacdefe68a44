"""Linear attention against double loops, autograd, torch's own attention, and what defines it."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.linear_attention import (
    State,
    attention_weights,
    delta_rule,
    effective_rank,
    elu_plus_one,
    gated_linear_attention,
    linear_attention,
    one_and_direction,
    recurrent_step,
    softmax_attention,
)

DECAYS = (None, 0.8, 0.0, 1.0)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(*leading, n=13, d=4, e=3, seed=0, dtype=torch.float64):
    return tuple(normal(*leading, n, size, seed=seed + i, dtype=dtype) for i, size in enumerate((d, d, e)))


def by_loops(q, k, v, decay=1.0, normalize=True, causal=True, state=None):
    """The definition with elu + 1, one pair of tokens after the other, in numpy. One sequence."""
    q, k, v = (x.numpy() for x in (q, k, v))

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))

    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        total, row = 0.0, np.zeros(v.shape[1])
        for j in range(i + 1 if causal else len(k)):
            weight = sum(a * b for a, b in zip(phi(q[i]), phi(k[j]), strict=True)) * decay ** max(i - j, 0)
            total, row = total + weight, row + weight * v[j]
        if state is not None:
            total += decay ** (i + 1) * phi(q[i]) @ state.z.numpy()
            row += decay ** (i + 1) * phi(q[i]) @ state.s.numpy()
        out[i] = row / total if normalize else row
    return torch.from_numpy(out)


def step_by_step(q, k, v, state=None, **settings):
    outputs = []
    for i in range(q.shape[-2]):
        out, state = recurrent_step(q[..., i, :], k[..., i, :], v[..., i, :], state, **settings)
        outputs.append(out)
    return torch.stack(outputs, -2), state


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * max(1.0, float(b.abs().max()))


# --- The three forms


@settings(max_examples=60)
@given(
    n=st.integers(1, 19),
    chunk=st.integers(1, 25),
    decay=st.sampled_from([*DECAYS, 0.37]),
    normalize=st.booleans(),
    with_state=st.booleans(),
    grad=st.booleans(),
)
def test_chunks_steps_and_loops_agree(n, chunk, decay, normalize, with_state, grad):
    q, k, v = qkv(n=n, seed=n)
    state = State(normal(4, 3, seed=7), normal(4, seed=8).abs()) if with_state else None
    expected = by_loops(q, k, v, 1.0 if decay is None else decay, normalize, state=state)
    chosen = {"decay": decay, "normalize": normalize}
    out, after = linear_attention(q.requires_grad_(grad), k, v, chunk_size=chunk, initial_state=state, **chosen)
    close(out.detach(), expected)
    stepped, last = step_by_step(q.detach(), k, v, state, **chosen)
    close(stepped, expected)
    for ours, theirs in zip(after, last, strict=True):
        close(ours.detach(), theirs)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_any_leading_axes(leading, grad):
    q, k, v = qkv(*leading, n=11)
    with torch.set_grad_enabled(grad):
        out, state = linear_attention(q.requires_grad_(grad), k, v, chunk_size=4)
    assert out.shape == (*leading, 11, 3) and state.s.shape == (*leading, 4, 3) and state.z.shape == (*leading, 4)
    for index in np.ndindex(*leading):
        close(out[index].detach(), by_loops(q[index].detach(), k[index], v[index]))


def test_leading_axes_broadcast_and_each_head_has_its_decay():
    q, k, v = normal(2, 3, 9, 4, seed=1), normal(3, 9, 4, seed=2), normal(2, 1, 9, 5, seed=3)
    decay = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    out, state = linear_attention(q, k, v, decay=decay, chunk_size=4)
    assert out.shape == (2, 3, 9, 5) and state.s.shape == (2, 3, 4, 5)
    for b, h in np.ndindex(2, 3):
        close(out[b, h], by_loops(q[b, h], k[h], v[b, 0], float(decay[h])))
    stepped, last = step_by_step(q, k.expand(2, 3, 9, 4), v.expand(2, 3, 9, 5), decay=decay)
    close(stepped, out)
    close(last.z, state.z)
    close(attention_weights(q, k, decay=decay) @ v, out)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(1, 22), max_size=4), decay=st.sampled_from(DECAYS), chunk=st.integers(1, 9))
def test_a_sequence_may_be_given_in_pieces(cuts, decay, chunk):
    q, k, v = qkv(2, n=23)
    whole, end = linear_attention(q, k, v, decay=decay, chunk_size=5)
    state, pieces, places = None, [], sorted({0, 23, *cuts})
    for a, b in pairwise(places):
        out, state = linear_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], decay=decay, chunk_size=chunk, initial_state=state
        )
        pieces.append(out)
    close(torch.cat(pieces, 1), whole)
    close(state.s, end.s)


def test_without_an_order_all_tokens_count_and_there_may_be_more_keys_than_queries():
    q, k, v = normal(5, 4), normal(9, 4, seed=1), normal(9, 3, seed=2)
    out, state = linear_attention(q, k, v, causal=False)
    close(out, by_loops(q, k, v, causal=False))
    close(attention_weights(q, k, causal=False) @ v, out)
    more, _ = linear_attention(
        q, k[:4], v[:4], causal=False, initial_state=linear_attention(q, k[4:], v[4:], causal=False)[1]
    )
    close(more, out)
    close(state.z, elu_plus_one(k).sum(0))


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_comes_from_the_future_to_the_last_bit(grad):
    q, k, v = qkv(2, n=40)
    before, _ = linear_attention(q.requires_grad_(grad), k, v, chunk_size=16)
    for changed in range(1, 40, 6):
        k2, v2 = k.clone(), v.clone()
        k2[:, changed:] *= -30
        v2[:, changed:] += 1e6
        after, _ = linear_attention(q, k2, v2, chunk_size=16)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, changed:], before[:, changed:])


def test_a_pair_of_maps_and_none():
    q, k, v = (x.abs() for x in qkv(n=7))
    ones, _ = linear_attention(q, k, v, feature_map=None, chunk_size=3)
    weights = (q @ k.T).tril()
    close(ones, weights @ v / weights.sum(-1, keepdim=True))
    pair, _ = linear_attention(q, k, v, feature_map=(torch.square, torch.exp), chunk_size=3)
    weights = (q.square() @ k.exp().T).tril()
    close(pair, weights @ v / weights.sum(-1, keepdim=True))


def test_eps_is_added_to_the_sum_of_weights():
    q, k, v = qkv(n=7)
    out, _ = linear_attention(q, k, v, eps=0.5)
    weights = (elu_plus_one(q) @ elu_plus_one(k).T).tril()
    close(out, weights @ v / (weights.sum(-1, keepdim=True) + 0.5))
    silent, _ = linear_attention(-q.abs(), -k.abs(), v, feature_map=F.relu, eps=1e-6)
    assert (silent == 0).all()
    stepped, _ = step_by_step(q, k, v, eps=0.5)
    close(stepped, out)


# --- Gradients


@pytest.mark.parametrize("decay", [*DECAYS, torch.tensor([0.3, 0.95], dtype=torch.float64)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_gradients_equal_autograd_s_through_the_square(decay, normalize, chunk):
    inputs = [x.requires_grad_() for x in qkv(2, n=11)]
    s0, z0 = normal(2, 4, 3, seed=5).requires_grad_(), (normal(2, 4, seed=6).abs() + 1).requires_grad_()
    g_out, g_s, g_z = normal(2, 11, 3, seed=7), normal(2, 4, 3, seed=8), normal(2, 4, seed=9)

    out, end = linear_attention(
        *inputs, decay=decay, normalize=normalize, chunk_size=chunk, initial_state=State(s0, z0)
    )
    ours = torch.autograd.grad([out, end.s, end.z], [*inputs, s0, z0], [g_out, g_s, g_z])

    # The same by the square, which autograd takes apart itself.
    q, k, v = inputs
    gamma = torch.as_tensor(1.0 if decay is None else decay, dtype=torch.float64).expand(2)[:, None, None]
    i = torch.arange(11)
    weights = elu_plus_one(q) @ elu_plus_one(k).mT * (gamma ** (i[:, None] - i).clamp(min=0)).tril()
    left, kept = gamma ** (i[:, None] + 1), gamma ** (10 - i[:, None])
    numerator = weights @ v + left * (elu_plus_one(q) @ s0)
    total = weights.sum(-1, keepdim=True) + left * (elu_plus_one(q) @ z0[..., None])
    s = (kept * elu_plus_one(k)).mT @ v + gamma**11 * s0
    z = (kept * elu_plus_one(k)).sum(-2) + gamma[:, 0] ** 11 * z0
    expected = numerator / total if normalize else numerator
    close(out.detach(), expected.detach())
    theirs = torch.autograd.grad([expected, s, z], [*inputs, s0, z0], [g_out, g_s, g_z])
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-11)


def test_gradients_of_gradients():
    inputs = [x.requires_grad_() for x in qkv(n=5, d=2, e=2)]

    def attend(q, k, v):
        return linear_attention(q, k, v, decay=0.9, chunk_size=2)[0]

    assert torch.autograd.gradcheck(attend, inputs) and torch.autograd.gradgradcheck(attend, inputs)


def test_a_learned_feature_map_learns():
    q, k, v = qkv(n=9)
    layer = torch.nn.Linear(4, 6, dtype=torch.float64)
    for inputs_learn in (False, True):
        q = q.detach().requires_grad_(inputs_learn)
        out, _ = linear_attention(q, k, v, feature_map=lambda x: layer(x).exp(), chunk_size=4)
        (ours,) = torch.autograd.grad(out.square().sum(), layer.weight)
        weights = (layer(q).exp() @ layer(k).exp().T).tril()
        square = (weights / weights.sum(-1, keepdim=True)) @ v
        close(ours, torch.autograd.grad(square.square().sum(), layer.weight)[0], 1e-11)


def test_the_backward_pass_keeps_no_square():
    """Memory for it must grow with n, not with n · chunk: what autograd keeps is counted."""
    kept = []
    q, k, v = (x.requires_grad_() for x in qkv(2, n=256, d=8, e=8))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_attention(q, k, v, feature_map=None, chunk_size=128)[0].sum()
    assert sum(kept) <= 8 * q.numel()  # the weights of the chunks alone would be 16 times that of q


# --- Precision and memory


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("grad", [False, True])
def test_low_precision_is_rounded_once(dtype, tol, grad):
    q, k, v = qkv(2, n=300, d=8, e=8, dtype=dtype)
    out, state = linear_attention(q.requires_grad_(grad), k, v)
    assert out.dtype == dtype and state.s.dtype == torch.float32
    exact, _ = linear_attention(*(x.detach().double() for x in (q, k, v)))
    close(out.detach().double(), exact, tol)
    stepped, _ = step_by_step(3 * q.detach() - 8, k, v)
    chunked, _ = linear_attention(3 * q.detach() - 8, k, v)
    assert stepped.dtype == dtype
    close(stepped.double(), chunked.double(), tol)


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_gates_and_the_delta_rule_are_rounded_once_too(dtype, tol):
    q, k, v = qkv(2, n=60, d=8, e=8, dtype=dtype)
    k = F.normalize(k, dim=-1)
    gate = torch.sigmoid(normal(2, 60, 8, seed=4)).to(dtype)
    for rule, last in ((gated_linear_attention, gate), (delta_rule, 0.5)):
        out, state = rule(q, k, v, last)
        assert out.dtype == dtype and state.dtype == torch.float32
        exact, _ = rule(q.double(), k.double(), v.double(), last.double() if torch.is_tensor(last) else last)
        close(out.double(), exact, tol)
    assert attention_weights(q, k, decay=0.5).dtype == dtype
    assert abs(effective_rank(q[0]) - effective_rank(q[0].double())) < 1e-2


def test_an_empty_batch_gives_an_empty_batch():
    out, state = linear_attention(*(x[:0] for x in qkv(2, n=5)))
    assert out.shape == (0, 5, 3) and state.s.shape == (0, 4, 3)


def test_steps_broadcast_as_sequences_do():
    q, k, v = normal(2, 3, 4), normal(3, 4, seed=1), normal(4, seed=2)[:3]
    out, state = recurrent_step(q, k, v)
    whole, end = linear_attention(q[..., None, :], k[..., None, :], v[None, :])
    close(out, whole[..., 0, :])
    assert state.s.shape == end.s.shape == (2, 3, 4, 3) and state.z.shape == end.z.shape
    with pytest.raises(ValueError, match="decay must lie in"):
        recurrent_step(q, k, v, decay=1.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_linear_in_n_and_decoding_takes_none():
    """Peak memory of a fresh process above its start, for n and 4 n tokens."""
    program = """
import sys, torch
from helpers.linear_attention import linear_attention, recurrent_step
torch.set_num_threads(1)

def peak():  # in kilobytes; unlike ru_maxrss, not inherited from the process that started this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

x = torch.ones(1, 64)
n = int(sys.argv[1])
linear_attention(torch.ones(64, 64), torch.ones(64, 64), torch.ones(64, 64))
start = peak()
state = None
for _ in range(2000):
    out, state = recurrent_step(x, x, x, state)
steps = peak()
q = torch.ones(n, 64)
linear_attention(q, q, q)
end = peak()
print(steps - start, end - steps)
"""
    peaks = {}
    for n in (65_536, 262_144):
        done = subprocess.run([sys.executable, "-c", program, str(n)], capture_output=True, text=True, check=True)
        decoding, peaks[n] = map(int, done.stdout.split())
        assert decoding < 4_000
        assert peaks[n] < 3.5 * n * 64 * 4 / 1024  # q and the output are two; a square would be thousands
    assert 3 < peaks[262_144] / peaks[65_536] < 5


# --- The softmax


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_softmax_attention_is_torch_s(causal, scale):
    q, k, v = qkv(2, 3, n=9)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    close(softmax_attention(q, k, v, causal=causal, scale=scale), theirs)


def test_elu_plus_one_keeps_its_relative_precision_in_float32_and_its_slope():
    x = torch.linspace(-80, 5, 200, dtype=torch.float32, requires_grad=True)
    exact = torch.where(x > 0, x.double() + 1, x.double().clamp(max=0).exp()).detach()
    assert ((elu_plus_one(x).double() - exact).abs() / exact).max() < 1e-6  # elu(x) + 1 is 0 from -18 on
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(elu_plus_one(zero), zero)[0] == 1


def test_feature_maps():
    x = torch.tensor([-800.0, -1.0, 0.0, 2.0, 800.0], dtype=torch.float64)
    close(elu_plus_one(x), torch.tensor([0.0, np.exp(-1), 1.0, 3.0, 801.0], dtype=torch.float64))
    given = x.clone()
    elu_plus_one(x)
    assert torch.equal(x, given)
    q, k = normal(5, 3), normal(6, 3, seed=1)
    cosine = F.cosine_similarity(q[:, None], k[None], dim=-1)
    close(one_and_direction(q) @ one_and_direction(k).T, 1 + cosine)
    assert one_and_direction(torch.zeros(1, 3)).tolist() == [[1, 0, 0, 0]]


# --- Gates and the delta rule


def test_a_gate_of_ones_is_the_sum_and_a_constant_one_is_decay():
    q, k, v = qkv(2, n=9)
    for gamma in (1.0, 0.7):
        expected, state = linear_attention(q, k, v, feature_map=None, normalize=False, decay=gamma)
        for width in (1, 4):
            out, end = gated_linear_attention(q, k, v, torch.full((2, 9, width), gamma, dtype=torch.float64))
            close(out, expected)
            close(end, state.s)


def test_gates_weigh_by_the_product_of_all_gates_between():
    q, k, v = qkv(n=9)
    gate = torch.sigmoid(normal(9, 4, seed=4))
    start = normal(4, 3, seed=5)
    out, end = gated_linear_attention(q, k, v, gate, initial_state=start)
    for i in range(9):
        row = (q[i] * gate[: i + 1].prod(0)) @ start
        for j in range(i + 1):
            row = row + (q[i] * k[j] * gate[j + 1 : i + 1].prod(0)).sum() * v[j]
        close(out[i], row)
    first, middle = gated_linear_attention(q[:4], k[:4], v[:4], gate[:4], initial_state=start)
    second, last = gated_linear_attention(q[4:], k[4:], v[4:], gate[4:], initial_state=middle)
    close(torch.cat([first, second]), out)
    close(last, end)


@settings(max_examples=30)
@given(n=st.integers(1, 17), chunk=st.integers(1, 20), start=st.booleans(), many=st.booleans())
def test_the_delta_rule_is_its_recurrence(n, chunk, start, many):
    q, k, v = qkv(2, n=n, seed=n)
    k = F.normalize(k, dim=-1)
    beta = torch.sigmoid(normal(2, n, seed=4)) if many else 0.8
    s = normal(2, 4, 3, seed=5) if start else None
    out, end = delta_rule(q, k, v, beta, chunk_size=chunk, initial_state=s)
    s = torch.zeros(2, 4, 3, dtype=torch.float64) if s is None else s
    for i in range(n):
        b = beta[:, i, None, None] if many else beta
        erase = torch.eye(4, dtype=torch.float64) - b * k[:, i, :, None] * k[:, i, None, :]
        s = erase @ s + b * k[:, i, :, None] * v[:, i, None, :]
        close(out[:, i], (q[:, i, None, :] @ s)[:, 0], 1e-11)
    close(end, s, 1e-11)


def test_the_delta_rule_reads_what_was_written_last():
    _, k, v = qkv(n=12, d=8)
    k = F.normalize(k, dim=-1)
    out, _ = delta_rule(k, k, v)
    close(out, v, 1e-11)


# --- Effective rank


def test_effective_rank_counts_equal_directions():
    q, _ = torch.linalg.qr(normal(6, 6))
    for rank in range(1, 7):
        assert abs(effective_rank(q[:, :rank] @ q[:, :rank].T) - rank) < 1e-9
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    share = values / values.sum()
    assert abs(effective_rank(torch.diag(values)) - float((-(share * share.log()).sum()).exp())) < 1e-12
    assert effective_rank(normal(2, 5, 6, 4)).shape == (2, 5)


# --- Bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": [[1.0]]}, TypeError, "q must be a tensor of floating-point numbers"),
        ({"k": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "k must be a tensor of floating-point"),
        ({"v": torch.ones(5, 3)}, TypeError, "must have one type"),
        ({"q": normal(5, 6)}, ValueError, "q has 6 features and k has 4"),
        ({"q": normal(4, 4)}, ValueError, "as many queries as keys, got 4 and 5"),
        ({"v": normal(6, 3)}, ValueError, "5 keys and 6 values"),
        ({"q": normal(4)}, ValueError, r"with at least one token, got \(4,\)"),
        ({"q": normal(0, 4), "k": normal(0, 4), "v": normal(0, 3)}, ValueError, r"got \(0, 4\)"),
        ({"q": normal(2, 5, 4), "k": normal(3, 5, 4)}, ValueError, "do not broadcast"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a whole number of at least 1, not 0"),
        ({"chunk_size": 2.5}, ValueError, "not 2.5"),
        ({"decay": 1.5}, ValueError, r"decay must lie in \[0, 1\], got 1.5"),
        ({"decay": float("nan")}, ValueError, "decay must lie in"),
        ({"decay": 0.5, "causal": False}, ValueError, "decay needs an order"),
        ({"decay": torch.tensor(0.5, requires_grad=True)}, ValueError, "decay gets no gradient"),
        ({"decay": torch.tensor([0.5, 0.5])}, ValueError, "decay of shape .2.* does not broadcast"),
        ({"initial_state": torch.ones(4, 3)}, TypeError, "a state must be a State"),
        ({"initial_state": State(normal(4, 2), normal(4))}, ValueError, r"s of shape \(\.\.\., 4, 3\)"),
        ({"feature_map": (torch.exp, one_and_direction)}, ValueError, "q 4 features and k 5"),
        ({"feature_map": lambda x: x.sum(-1)}, ValueError, "may change the last axis only"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = dict(zip("qkv", qkv(n=5), strict=True)) | change
    with pytest.raises(error, match=message):
        linear_attention(**arguments)


def test_bad_input_elsewhere():
    q, k, v = qkv(n=5)
    with pytest.raises(ValueError, match="gate must have shape"):
        gated_linear_attention(q, k, v, normal(5, 3))
    with pytest.raises(ValueError, match="beta must be a number or have shape"):
        delta_rule(q, k, v, normal(4))
    with pytest.raises(ValueError, match="chunk_size must be"):
        delta_rule(q, k, v, chunk_size=0)
    with pytest.raises(ValueError, match="as many queries as keys"):
        softmax_attention(q[:3], k, v)

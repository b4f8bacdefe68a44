"""Both suspects and both remedies against autograd, finite differences, masked softmax attention and brute force."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.byte_model import linear_stateful, softmax_cached, transformer
from helpers.linear_attention import attention_weights, elu_plus_one, linear_attention
from helpers.transnormer import (
    OpenBlock,
    TrainingMeter,
    attention_maps,
    attention_mass,
    diag_attention,
    diag_multiplications,
    norm_attention,
    norm_gradient_bound,
    norm_stateful,
    qk_gradient_norms,
    relative_spread,
    rms_norm,
    rms_norm_jacobian,
    two_stage,
    unscaled_stateful,
    weights_jacobian,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blocks_mask(n, block, causal):
    return torch.tensor([[i // block == j // block and (j <= i or not causal) for j in range(n)] for i in range(n)])


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --- Derivatives and bounds


@pytest.mark.parametrize("name", ["softmax", "linear", "square"])
def test_the_jacobian_of_the_weights_is_autograds(name):
    f, rate = {
        "softmax": (torch.exp, lambda s: 1.0),
        "linear": (lambda s: s, lambda s: 1 / s),
        "square": (torch.square, lambda s: 2 / s),
    }[name]
    s = normal(3, 7, seed=1).abs() + 0.01
    weights = lambda row: f(row) / f(row).sum()  # noqa: E731
    expected = torch.stack([torch.autograd.functional.jacobian(weights, row) for row in s])
    p = torch.stack([weights(row) for row in s])
    close(weights_jacobian(p, rate(s)), expected)
    close(weights_jacobian(p, rate(s)).sum(-2), torch.zeros(3, 7, dtype=torch.float64), 1e-10)


def test_the_derivative_of_equal_linear_scores():
    p, s = torch.full((64,), 1 / 64, dtype=torch.float64), torch.full((64,), 1e-6, dtype=torch.float64)
    assert weights_jacobian(p, 1 / s).abs().max().item() == pytest.approx(15380.859375, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.floats(1e-9, 1e4), st.integers(0, 99))
def test_the_slope_of_the_softmax_is_at_most_a_quarter(n, size, seed):
    p = (size * normal(n, seed=seed)).softmax(-1)
    assert weights_jacobian(p, 1.0).abs().max() <= 0.25 + 1e-15


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.floats(-12, 3), st.floats(-12, 3), st.integers(0, 99))
def test_in_q_and_in_k_the_slope_with_elu_plus_one_is_at_most_a_quarter(n, d, shift_q, shift_k, seed):
    q, k = normal(d, seed=seed) + shift_q, normal(n, d, seed=seed + 100) + shift_k
    weights = lambda q, k: attention_weights(q[None], k, causal=False)[0]  # noqa: E731
    in_q, in_k = torch.autograd.functional.jacobian(weights, (q, k))
    p = weights(q, k)
    assert (in_q.abs() <= (p * (1 - p))[:, None] + 1e-12).all() and in_q.abs().max() <= 0.25 + 1e-12
    assert (in_k.abs() <= (p * (1 - p))[:, None] + 1e-12).all()  # the key's own share bounds it as well
    assert in_k.abs().max() <= 0.25 + 1e-12


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5), st.floats(-8, 3), st.integers(0, 99))
def test_no_weight_exceeds_what_the_keys_allow(n, d, shift, seed):
    q, k = 3 * normal(20, d, seed=seed), normal(n, d, seed=seed + 100) + shift
    features = elu_plus_one(k)
    allowed = (features / features.sum(0)).amax(-1)
    assert (attention_weights(q, k, causal=False) <= allowed + 1e-12).all()


def test_small_keys_leave_the_slope_in_q_as_it_is_and_raise_that_in_k_without_bound():
    q, k = torch.tensor([0.3, 0.8]).double(), torch.tensor([[0.5, 0.1], [0.2, 0.9], [0.7, 0.6]]).double()
    weights = lambda q, k: attention_weights(q[None], k, feature_map=torch.relu, causal=False)[0]  # noqa: E731
    in_q, in_k = torch.autograd.functional.jacobian(weights, (q, k))
    for size in (1e-3, 1e-6):
        small_q, small_k = torch.autograd.functional.jacobian(weights, (q, size * k))
        close(small_q, in_q)
        close(size * small_k, in_k)


def test_in_q_the_slope_with_relu_has_no_bound():
    keys = torch.eye(2, dtype=torch.float64)
    for size in (1e-2, 1e-5):
        q = torch.full((2,), size, dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(
            lambda q: attention_weights(q[None], keys, feature_map=torch.relu, causal=False)[0], q
        )
        assert slope.abs().max().item() == pytest.approx(1 / (4 * size))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_rms_norm_is_torchs_and_its_jacobian_autograds(eps):
    x = normal(4, 5, seed=2)
    close(rms_norm(x, eps), F.rms_norm(x, (5,), eps=eps))
    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda row: F.rms_norm(row, (5,), eps=eps), r) for r in x]
    )
    close(rms_norm_jacobian(x, eps), expected)
    largest = torch.linalg.matrix_norm(rms_norm_jacobian(x, eps), 2)
    close(largest, 1 / (x.square().mean(-1) + eps).sqrt())


def test_rms_norm_does_not_overflow():
    half = rms_norm(torch.tensor([[300.0, 400.0]], dtype=torch.float16))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, torch.tensor([[300.0, 400.0]]).div(125_000**0.5).half())
    rows = normal(300, 8, seed=10).half()
    assert (rms_norm(rows) == rms_norm(rows.double()).half()).double().mean() > 0.99  # rounded once
    for x in (torch.tensor([1e20, 2e20]), torch.tensor([3e38, 0.0]), torch.tensor([-1e30, 1e-30])):
        close(rms_norm(x), F.rms_norm(x.double(), (2,), eps=1e-6).float(), 1e-6)
    q = torch.full((5, 4), 1e7)
    close(norm_attention(q, q, q)[0], torch.ones(5, 4), 1e-6)
    assert (rms_norm(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_the_gradient_of_rms_norm_is_that_of_torch(size):
    x = (size * normal(3, 5, seed=8)).requires_grad_()
    upstream = normal(3, 5, seed=9)
    ours, theirs = (
        torch.autograd.grad((f(x) * upstream).sum(), x)[0] for f in (rms_norm, lambda x: F.rms_norm(x, (5,), eps=1e-6))
    )
    close(size * ours, size * theirs, 1e-11)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(2, 8), st.floats(-8, 1), st.integers(0, 99))
def test_no_score_of_norm_attention_exceeds_the_bound(n, d, exponent, seed):
    eps = 1e-4
    s = (10**exponent * normal(n, n, seed=seed)).requires_grad_()
    v, upstream = normal(n, d, seed=seed + 1), normal(n, d, seed=seed + 2)
    (F.rms_norm(s @ v, (d,), eps=eps) * upstream).sum().backward()
    bound = norm_gradient_bound(upstream.norm(dim=-1).max().item(), v.norm(dim=-1).max().item(), eps)
    assert s.grad.abs().max().item() <= bound * (1 + 1e-12)


def test_the_bound_is_attained_and_the_papers_is_larger_by_three_halves_d():
    v = normal(1, 6, seed=3)
    s = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)  # nothing comes out, so only eps is left
    (F.rms_norm(s @ v, (6,), eps=1e-4) * v).sum().backward()
    length = v.norm().item()
    assert s.grad.item() == pytest.approx(norm_gradient_bound(length, length, 1e-4), rel=1e-12)
    paper = norm_gradient_bound(length, length, 1e-4, paper_width=6)
    assert paper == pytest.approx(3 * length**2 * 6 / (2 * 1e-2), rel=1e-12)
    for eps in (0, math.nan):
        with pytest.raises(ValueError, match=f"no bound for eps = {eps}"):
            norm_gradient_bound(1, 1, eps)


# --- NormAttention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", [None, elu_plus_one, torch.relu])
def test_norm_attention_is_the_square_matrix_then_the_norm(causal, feature_map):
    q, k, v = normal(3, 2, 11, 4, seed=4)
    phi = feature_map or (lambda x: x)
    weights = phi(q) @ phi(k).mT
    if causal:
        weights = weights * torch.ones(11, 11).tril()
    expected = F.rms_norm(weights @ v, (4,), eps=1e-3)
    out, _ = norm_attention(q, k, v, feature_map=feature_map, causal=causal, eps=1e-3, chunk_size=4)
    close(out, expected)


def test_the_norm_takes_the_denominator_away():
    q, k, v = normal(3, 2, 50, 8, seed=5)
    divided, _ = linear_attention(q, k, v)
    close(F.rms_norm(divided, (8,), eps=0.0), norm_attention(q, k, v, eps=0.0)[0], 1e-11)


@pytest.mark.parametrize("attention", [norm_stateful, unscaled_stateful])
def test_pieces_give_what_the_whole_gives(attention):
    q, k, v = normal(3, 2, 3, 20, 4, seed=6)
    whole, end = attention(q, k, v)
    state, out = None, []
    for a, b in ((0, 1), (1, 9), (9, 20)):
        piece, state = attention(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], state)
        out.append(piece)
    close(torch.cat(out, -2), whole)
    close(state.s, end.s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_sum_and_rounded_once(dtype):
    q, k, v = 40 * normal(3, 300, 4, seed=7).abs()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, _ = norm_attention(q, k, v)  # the sums reach 10⁹: far beyond float16
    exact, _ = norm_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_norm_attention_refuses_what_does_not_fit():
    q = normal(5, 3)
    with pytest.raises(ValueError, match="eps must not be negative"):
        norm_attention(q, q, q, eps=-1.0)
    with pytest.raises(ValueError, match="eps must not be negative"):
        norm_attention(q, q, q, eps=math.nan)
    with pytest.raises(TypeError, match="q must be a tensor"):
        norm_attention([1.0], q, q)
    with pytest.raises(TypeError, match="state must be a State"):
        norm_attention(q, q, q, OpenBlock(q, q))


# --- DiagAttention


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 23), st.integers(1, 25), st.booleans(), st.sampled_from([None, 0.5, 0.0]), st.integers(0, 9))
def test_diag_attention_is_softmax_attention_behind_a_block_mask(n, block, causal, scale, seed):
    q, k = normal(2, 2, n, 3, seed=seed)
    v = normal(2, n, 5, seed=seed + 10)
    out, state = diag_attention(q, k, v, block=block, causal=causal, scale=scale)
    mask = blocks_mask(n, block, causal)
    close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    assert state.k.shape[-2] == state.v.shape[-2] == n % block
    close(state.k, k[..., n - n % block :, :])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 8),
    st.sampled_from([None, 0.3]),
    st.integers(0, 9),
)
def test_diag_attention_in_pieces_is_diag_attention_of_the_whole(pieces, block, scale, seed):
    n = sum(pieces)
    q, k, v = normal(3, 2, n, 3, seed=seed)
    whole, end = diag_attention(q, k, v, block=block, scale=scale)
    state, out, at = None, [], 0
    for length in pieces:
        part = slice(at, at + length)
        piece, state = diag_attention(q[:, part], k[:, part], v[:, part], state, block=block, scale=scale)
        out.append(piece)
        at += length
    close(torch.cat(out, -2), whole)
    close(state.k, end.k)
    close(state.v, end.v)


def test_diag_attention_broadcasts_its_leading_axes():
    q, k, v = normal(3, 1, 10, 4), normal(2, 10, 4, seed=1), normal(10, 4, seed=2)
    expected = F.scaled_dot_product_attention(
        q.expand(3, 2, 10, 4), k.expand(3, 2, 10, 4), v.expand(3, 2, 10, 4), attn_mask=blocks_mask(10, 4, True)
    )
    whole, _ = diag_attention(q, k, v, block=4)
    close(whole, expected)
    first, state = diag_attention(q[..., :3, :], k[..., :3, :], v[..., :3, :], block=4)
    rest, _ = diag_attention(q[..., 3:, :], k[..., 3:, :], v[..., 3:, :], state, block=4)
    close(torch.cat([first, rest], -2), whole)


def test_one_block_of_all_tokens_is_full_attention_and_blocks_of_one_give_v():
    q, k, v = normal(3, 2, 9, 4)
    close(diag_attention(q, k, v, block=100)[0], softmax_cached(q, k, v)[0])
    close(diag_attention(q, k, v, block=1)[0], v)


def test_no_token_of_another_block_has_any_influence():
    q, k, v = normal(3, 12, 4).requires_grad_()
    out, _ = diag_attention(q, k, v, block=5)
    (gradient,) = torch.autograd.grad(out[7].sum(), v)
    assert (gradient.abs().sum(-1) > 0).tolist() == [5 <= j <= 7 for j in range(12)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_diag_attention_keeps_the_type(dtype):
    q, k, v = normal(3, 10, 4).to(dtype)
    out, state = diag_attention(q, k, v, block=4)
    assert out.dtype == state.k.dtype == dtype
    exact, _ = diag_attention(q.double(), k.double(), v.double(), block=4)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_the_state_does_not_keep_the_whole_sequence_alive():
    q, k, v = normal(3, 1000, 4)
    _, state = diag_attention(q, k, v, block=64)
    assert state.k.untyped_storage().nbytes() == (1000 % 64) * 4 * 8


def test_diag_attention_refuses_what_does_not_fit():
    q = normal(5, 3)
    for block in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="block must be a whole number"):
            diag_attention(q, q, q, block=block)
    with pytest.raises(ValueError, match="as many tokens"):
        diag_attention(q, q[:4], q[:4], block=2)
    with pytest.raises(ValueError, match="as many features"):
        diag_attention(q, q[:, :2], q, block=2)
    with pytest.raises(ValueError, match="with a token"):
        diag_attention(q[:0], q[:0], q[:0], block=2)
    with pytest.raises(TypeError, match="floating-point"):
        diag_attention(q.long(), q, q, block=2)
    with pytest.raises(TypeError, match="one type"):
        diag_attention(q.float(), q, q, block=2)
    with pytest.raises(TypeError, match="OpenBlock"):
        diag_attention(q, q, q, (q, q), block=9)
    with pytest.raises(ValueError, match="order of the tokens"):
        diag_attention(q, q, q, OpenBlock(q, q), block=9, causal=False)
    for state in (OpenBlock(q, q), OpenBlock(q[:3], q[:2]), OpenBlock(q[:2, :2], q[:2]), OpenBlock(q[:2], q[:2, :2])):
        with pytest.raises(ValueError, match="the state must have k"):
            diag_attention(q, q, q, state, block=5)


def test_a_state_of_another_type_or_of_another_batch_is_refused():
    q = normal(2, 5, 3)
    with pytest.raises(TypeError, match=r"the state must be of the type torch\.float64"):
        diag_attention(q, q, q, OpenBlock(q[:, :2].float(), q[:, :2].float()), block=5)
    for axes in ((7,), (1, 2)):
        old = normal(*axes, 2, 3)
        with pytest.raises(ValueError, match="leading axes"):
            diag_attention(q, q, q, OpenBlock(old, old), block=5)
    shared = OpenBlock(q[:1, :2], q[:1, :2])  # one past for the whole batch
    apart = OpenBlock(*(x.expand(2, 2, 3) for x in shared))
    close(diag_attention(q, q, q, shared, block=5)[0], diag_attention(q, q, q, apart, block=5)[0])


def test_the_block_may_be_numpys():
    q = normal(7, 3)
    close(diag_attention(q, q, q, block=np.int64(3))[0], diag_attention(q, q, q, block=3)[0])


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 9))
def test_the_cost_counts_the_pairs_of_a_block(n, block, d):
    assert diag_multiplications(n, block, d) == 2 * d * int(blocks_mask(n, block, False).sum())


def test_the_cost_of_nothing_is_refused():
    for bad in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            diag_multiplications(*bad)


# --- Instruments


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 14), st.booleans(), st.integers(0, 9))
def test_the_mass_is_what_summing_one_by_one_gives(n, width, causal, seed):
    weights = normal(2, n, n, seed=seed).abs() + 1e-3
    got = attention_mass(weights, width, causal=causal)
    for b in range(2):
        for i in range(n):
            row = [(j, weights[b, i, j].item()) for j in range(n) if j <= i or not causal]
            near = [w for j, w in row if (i - width < j <= i if causal else abs(i - j) <= width // 2)]
            assert got[b, i].item() == pytest.approx(sum(near) / sum(w for _, w in row), rel=1e-12)


def test_the_mass_of_even_weights():
    even = torch.ones(10, 10, dtype=torch.float64)
    expected = [min(4, i + 1) / (i + 1) for i in range(10)]
    close(attention_mass(even, 4), torch.tensor(expected, dtype=torch.float64))
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="width must be"):
            attention_mass(even, bad)
    with pytest.raises(ValueError, match="shape"):
        attention_mass(even[:3], 2)


def test_the_maps_are_the_weights_of_each_layer():
    tokens = torch.arange(2 * 12).reshape(2, 12) * 9 % 256
    for attention in (
        softmax_cached,
        linear_stateful,
        norm_stateful,
        unscaled_stateful,
        partial(diag_attention, block=5),
    ):
        model = transformer(attention, width=16, heads=2, dtype=torch.float64)
        maps = attention_maps(model, tokens)
        assert maps.shape == (2, 2, 2, 12, 12)
        x = model.embed(tokens) + torch.cat(
            [f(torch.arange(12)[:, None] * model.rate) for f in (torch.sin, torch.cos)], -1
        )
        for layer, got in zip(model.blocks, maps, strict=True):
            q, k, _ = layer.project(x)
            if attention is softmax_cached or isinstance(attention, partial):
                mask = blocks_mask(12, 100 if attention is softmax_cached else 5, True)
                expected = (q @ k.mT / 8**0.5).masked_fill(~mask, -math.inf).softmax(-1)
            else:
                expected = attention_weights(q, k)
            # The eps of the norm cancels in the division by the row's sum; what is left is rounding.
            close(got, expected, 1e-12)
            x, _ = layer(x)
        assert not model.blocks[0]._forward_pre_hooks


def test_the_maps_leave_no_hook_behind_and_show_an_empty_row():
    model = transformer(linear_stateful, width=16, heads=2)
    with pytest.raises(IndexError):
        attention_maps(model, torch.full((1, 4), 300))
    assert not any(layer._forward_pre_hooks for layer in model.blocks)
    dead = lambda q, k, v, state=None: linear_attention(q - 100, k, v, feature_map=torch.relu, eps=1e-6)  # noqa: E731
    assert attention_maps(transformer(dead, width=16, heads=2), torch.arange(4)[None]).isnan().all()


def test_the_gradient_norms_are_those_of_q_and_k():
    model = transformer(linear_stateful, width=16, heads=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="backward"):
        qk_gradient_norms(model)
    x = normal(1, 6, 16)
    layer = model.blocks[1]
    w, b = (p.detach() for p in (layer.qkv.weight, layer.qkv.bias))
    parts = [w[16 * i : 16 * i + 16].clone().requires_grad_() for i in range(3)]
    heads = [
        (layer.norm(x) @ p.T + b[16 * i : 16 * i + 16]).unflatten(-1, (2, 8)).mT.mT.transpose(1, 2)
        for i, p in enumerate(parts)
    ]
    linear_attention(*heads)[0].square().sum().backward()
    mixed, _ = layer.attention(*layer.project(x), None)
    mixed.square().sum().backward()
    model.blocks[0].qkv.weight.grad = torch.zeros_like(w)
    expected = math.hypot(parts[0].grad.norm(), parts[1].grad.norm())
    assert qk_gradient_norms(model) == [0.0, pytest.approx(expected, rel=1e-12)]


def test_the_relative_spread():
    assert relative_spread([1.0, 3.0]) == pytest.approx(0.5)
    rows = np.random.default_rng(0).gamma(2.0, size=(3, 500))
    np.testing.assert_allclose(relative_spread(rows), [row.std() / row.mean() for row in rows], rtol=1e-12)
    np.testing.assert_allclose(relative_spread(7 * rows), relative_spread(rows), rtol=1e-12)
    with np.errstate(invalid="raise"):
        assert np.isnan(relative_spread([[1.0, np.nan], [1.0, np.inf], [2.0, 2.0]])).tolist() == [True, True, False]


def test_the_spread_inside_a_window_ignores_a_trend():
    rows = np.random.default_rng(1).gamma(2.0, size=(2, 40))
    expected = [np.mean([r[a : a + 7].std() / r[a : a + 7].mean() for a in range(34)]) for r in rows]
    np.testing.assert_allclose(relative_spread(rows, 7), expected, rtol=1e-12)
    np.testing.assert_allclose(relative_spread(rows, 40), relative_spread(rows), rtol=1e-12)
    trend = np.exp(np.linspace(0, 5, 1000))
    assert relative_spread(trend) > 1 > 20 * relative_spread(trend, 5)
    for bad in (0, 41):
        with pytest.raises(ValueError, match="window must lie between 1 and the 40"):
            relative_spread(rows, bad)


def test_the_meter_reads_every_step_and_the_trained_model():
    model, meter = transformer(two_stage(block=8), width=16, heads=2), TrainingMeter()
    for step in range(3):
        logits, _ = model(torch.full((1, 9), step))
        model.zero_grad()
        logits.square().mean().backward()
        meter(step, model)
    result = meter.result(model, length=16, pieces=2)
    assert result["gradients"].shape == (2, 3) and (result["gradients"] > 0).all()
    assert result["gradients"][:, 2].tolist() == qk_gradient_norms(model)
    mass = result["mass"]
    assert mass.shape == (2, 16) and (np.diff(mass, axis=1) > -1e-6).all()
    np.testing.assert_allclose(mass[:, -1], 1, rtol=1e-5)
    np.testing.assert_allclose(mass[0, 7], 1, rtol=1e-5)  # a block of 8 sees no more than 8 tokens
    assert mass[1, 7] < 0.9


# --- The two stages


def test_the_two_stages_stream():
    model = transformer(two_stage(3, early=2, block=4), width=16, heads=2, layers=3, dtype=torch.float64)
    tokens = torch.arange(22)[None] * 11 % 256
    whole, _ = model(tokens)
    state, out = None, []
    for piece in tokens.split([1, 6, 1, 1, 13], dim=1):
        logits, state = model(piece, state)
        out.append(logits)
    close(torch.cat(out, 1), whole)


def test_the_two_stages_are_the_attentions_that_they_say():
    q, k, v = normal(3, 1, 1, 10, 4)
    first, second = two_stage(block=3)
    close(first(q, k, v, None)[0], diag_attention(q, k, v, block=3)[0])
    assert second is norm_stateful
    assert two_stage(4, early=3, late=linear_stateful)[3] is linear_stateful
    assert [a is norm_stateful for a in two_stage(4, early=1)] == [False, True, True, True]
    for early in (-1, 3):
        with pytest.raises(ValueError, match="early must lie"):
            two_stage(2, early=early)

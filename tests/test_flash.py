"""Gated attention units and mixed chunks against their sums, written out token by token, and counted operations."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.byte_model import AttentionBlock, load_bytes, next_byte_loss, transformer
from helpers.flash import (
    ChunkState,
    GatedAttentionUnit,
    RowMeter,
    Watch,
    Weights,
    flash_model,
    gated_attention_unit,
    gau_cost,
    mixed_chunk_attention,
    rotary_softmax,
    rotate,
    squared_relu_weights,
    transformer_cost,
)
from helpers.linear_attention import softmax_attention

sizes = {"n": st.integers(1, 23), "c": st.integers(1, 25), "seed": st.integers(0, 9)}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n, s=3, e=4, seed=0, leading=()):
    return [normal(*leading, n, width, seed=10 * seed + i) for i, width in enumerate((s, s, s, s, e))]


def token_by_token(q, k, q_lin, k_lin, v, c, causal):
    """Each output as a sum over pairs in plain Python: two means, over the own chunk and over the other ones."""
    n, s = q.shape
    rows = []
    for i in range(n):
        own = [j for j in range(n) if j // c == i // c and (j <= i or not causal)]
        others = [j for j in range(n) if (j // c < i // c if causal else j // c != i // c)]
        near = sum(max(float(q[i] @ k[j]), 0.0) ** 2 / s * v[j] for j in own) / len(own)
        far = sum(float(q_lin[i] @ k_lin[j]) / math.sqrt(s) * v[j] for j in others) / max(len(others), 1)
        rows.append(near + far)
    return torch.stack(rows)


def unit_by_hand(x, w, a):
    """The unit with a given matrix of weights: silu as x / (1 + exp(-x)), in numpy."""
    u, v = (h / (1 + np.exp(-h)) for h in (x.numpy() @ w.u.numpy(), x.numpy() @ w.v.numpy()))
    return torch.tensor((u * (a.numpy() @ v)) @ w.o.numpy())


def some_weights(d=5, e=6, s=3, maps=2, seed=0):
    shapes = ((d, e), (d, e), (d, s), (maps, s), (maps, s), (e, d))
    return Weights(*(normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)))


class TestWeights:
    @given(n=st.integers(1, 12), extra=st.integers(0, 6), s=st.integers(1, 5), causal=st.booleans())
    def test_equal_the_sum(self, n, extra, s, causal):
        q, k = normal(n, s), normal(n + extra, s, seed=1)
        ours = squared_relu_weights(q, k, causal=causal)
        for i in range(n):
            seen = extra + i + 1 if causal else n + extra
            for j in range(n + extra):
                right = max(float(q[i] @ k[j]), 0.0) ** 2 / s / seen if j < seen else 0.0
                assert abs(float(ours[i, j]) - right) < 1e-12

    def test_alike_tokens_get_the_same_output_whatever_their_number(self):
        """A mean, not a sum: this is what the division by the number of keys is for."""
        for n in (1, 7, 300):
            q = torch.ones(n, 4, dtype=torch.float64)
            for causal in (True, False):
                row_sums = squared_relu_weights(q, q, causal=causal).sum(-1)
                assert (row_sums - 4.0).abs().max() < 1e-12  # (4/√4)²

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_rounded_once(self, dtype, causal):
        q, k = normal(300, 4, dtype=dtype), normal(300, 4, seed=1, dtype=dtype)
        ours = squared_relu_weights(q, k, causal=causal)
        assert ours.dtype == dtype
        assert torch.equal(ours, squared_relu_weights(q.float(), k.float(), causal=causal).to(dtype))

    def test_large_scores_in_half_precision(self):
        """The score is 288; its square, 82,944, is beyond float16, its quarter is not."""
        q = torch.full((4, 64), 6.0, dtype=torch.float16)
        for causal in (True, False):
            assert squared_relu_weights(q, q, causal=causal)[3].tolist() == [20736.0] * 4

    def test_leading_axes(self):
        q, k = normal(2, 1, 5, 3), normal(3, 5, 3, seed=1)
        ours = squared_relu_weights(q, k)
        assert ours.shape == (2, 3, 5, 5)
        assert (ours[1, 2] - squared_relu_weights(q[1, 0], k[2])).abs().max() < 1e-15

    def test_what_cannot_be_is_named(self):
        with pytest.raises(ValueError, match="q has 3 features and k has 2"):
            squared_relu_weights(normal(4, 3), normal(4, 2))
        with pytest.raises(ValueError, match="a key for each query, got 5 queries and 4 keys"):
            squared_relu_weights(normal(5, 3), normal(4, 3))
        with pytest.raises(ValueError, match=r"k must have shape \(..., tokens, features\) with at least one token"):
            squared_relu_weights(normal(5, 3), normal(0, 3))
        with pytest.raises(TypeError, match=r"q must be a tensor of floating-point numbers, not torch.int64"):
            squared_relu_weights(torch.ones(2, 2, dtype=torch.int64), normal(2, 2))
        with pytest.raises(TypeError, match=r"all must have one type, got q torch.float32, k torch.float64"):
            squared_relu_weights(normal(2, 2, dtype=torch.float32), normal(2, 2))


class TestMixedChunks:
    @given(**sizes, causal=st.booleans())
    def test_equal_the_sum_token_by_token(self, n, c, seed, causal):
        given_ = inputs(n, seed=seed)
        ours, _ = mixed_chunk_attention(*given_, chunk_size=c, causal=causal)
        assert (ours - token_by_token(*given_, c, causal)).abs().max() < 1e-12

    @given(**sizes, causal=st.booleans())
    def test_one_chunk_is_the_quadratic_attention_to_the_last_bit(self, n, c, seed, causal):
        q, k, q_lin, k_lin, v = inputs(n, seed=seed)
        ours, _ = mixed_chunk_attention(q, k, q_lin, k_lin, v, chunk_size=n + c - 1, causal=causal)
        assert torch.equal(ours, squared_relu_weights(q, k, causal=causal) @ v)

    @given(**sizes, changed=st.integers(0, 22))
    def test_the_future_changes_no_bit(self, n, c, seed, changed):
        given_ = inputs(n, seed=seed)
        before, _ = mixed_chunk_attention(*given_, chunk_size=c)
        at = changed % n
        other = [torch.cat([x[:at], 5 + 3 * x[at:]]) for x in given_]
        after, _ = mixed_chunk_attention(*other, chunk_size=c)
        assert torch.equal(before[:at], after[:at])
        assert not torch.equal(before[at:], after[at:])

    @given(**sizes, cuts=st.lists(st.integers(1, 22), max_size=4))
    def test_in_pieces_it_is_the_same(self, n, c, seed, cuts):
        given_ = inputs(n, seed=seed, leading=(2,))
        whole, end = mixed_chunk_attention(*given_, chunk_size=c)
        edges = [0, *sorted({cut % n for cut in cuts} - {0}), n]
        state, parts = None, []
        for a, b in pairwise(edges):
            part, state = mixed_chunk_attention(*(x[:, a:b] for x in given_), chunk_size=c, initial_state=state)
            parts.append(part)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
        assert state.before == end.before == (n - 1) // c * c
        assert (state.far is None) == (end.far is None) == (n <= c)
        assert torch.equal(state.v, end.v) and state.v.shape[1] == n - state.before

    def test_the_state_does_not_grow(self):
        state, most = None, 0
        for i in range(50):
            token = inputs(1, seed=i)
            _, state = mixed_chunk_attention(*token, chunk_size=8, initial_state=state)
            most = max(most, state.k.shape[0])
        assert most == 8 and state.far.s.shape == (3, 4)
        assert state.before == 48 and state.v.shape == (2, 4)

    def test_the_state_is_a_copy(self):
        """A view would hold all tokens, and change with the caller's tensors."""
        given_, more = inputs(100), inputs(3, seed=1)
        _, state = mixed_chunk_attention(*given_, chunk_size=8)
        expected, _ = mixed_chunk_attention(*more, chunk_size=8, initial_state=state)
        for x in given_:
            x.zero_()
        assert torch.equal(mixed_chunk_attention(*more, chunk_size=8, initial_state=state)[0], expected)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in (state.k, state.k_lin, state.v))

    @pytest.mark.parametrize("causal", [True, False])
    def test_leading_axes_broadcast(self, causal):
        q, k, q_lin, k_lin, v = inputs(7)
        q, v = normal(2, 1, 7, 3), normal(3, 7, 4)
        ours, _ = mixed_chunk_attention(q, k, q_lin, k_lin, v, chunk_size=3, causal=causal)
        assert ours.shape == (2, 3, 7, 4)
        alone, _ = mixed_chunk_attention(q[1, 0], k, q_lin, k_lin, v[2], chunk_size=3, causal=causal)
        assert (ours[1, 2] - alone).abs().max() < 1e-14

    @pytest.mark.parametrize("causal", [True, False])
    def test_gradients(self, causal):
        given_ = [x.requires_grad_() for x in inputs(7, s=2, e=2)]
        assert torch.autograd.gradcheck(lambda *x: mixed_chunk_attention(*x, chunk_size=3, causal=causal)[0], given_)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
    def test_low_precision_is_rounded_once(self, dtype, tolerance):
        given_ = [x.to(dtype) for x in inputs(40, s=8, e=8)]
        exact, _ = mixed_chunk_attention(*(x.double() for x in given_), chunk_size=8)
        ours, state = mixed_chunk_attention(*given_, chunk_size=8)
        assert ours.dtype == dtype and state.far.s.dtype == torch.float32
        assert torch.equal(ours, mixed_chunk_attention(*(x.float() for x in given_), chunk_size=8)[0].to(dtype))
        assert (ours.double() - exact).abs().max() < tolerance * exact.abs().max()

    @pytest.mark.parametrize(
        "change, problem",
        [
            ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, not 0"),
            ({"chunk_size": 2.0}, "chunk_size must be a whole number of at least 1, not 2.0"),
            ({"k": normal(6, 3)}, r"same number of tokens.* got q \(5, 3\), k \(6, 3\)"),
            ({"q_lin": normal(5, 2)}, r"also of features, got q \(5, 3\).*q_lin \(5, 2\)"),
            ({"v": normal(4)}, r"v must have shape \(..., tokens, features\)"),
        ],
    )
    def test_what_cannot_be_is_named(self, change, problem):
        given_ = dict(zip(("q", "k", "q_lin", "k_lin", "v"), inputs(5), strict=True)) | change
        with pytest.raises(ValueError, match=problem):
            mixed_chunk_attention(**given_)

    def test_states_that_do_not_fit_are_named(self):
        token = inputs(9)
        _, state = mixed_chunk_attention(*token, chunk_size=4)
        with pytest.raises(ValueError, match="the state comes from chunks of 4, not of 3"):
            mixed_chunk_attention(*token, chunk_size=3, initial_state=state)
        _, state = mixed_chunk_attention(*inputs(5), chunk_size=4)  # its sizes would fit chunks of 2
        with pytest.raises(ValueError, match="the state comes from chunks of 4, not of 2"):
            mixed_chunk_attention(*token, chunk_size=2, initial_state=state)
        with pytest.raises(ValueError, match="causal=True only"):
            mixed_chunk_attention(*token, chunk_size=4, causal=False, initial_state=state)
        with pytest.raises(ValueError, match="3 features of keys and 4 of values, but k has 2 and v has 4"):
            mixed_chunk_attention(*inputs(9, s=2), chunk_size=4, initial_state=state)
        with pytest.raises(TypeError, match="must be a ChunkState, not tuple"):
            mixed_chunk_attention(*token, chunk_size=4, initial_state=(None, None))


class TestUnit:
    @pytest.mark.parametrize("causal", [True, False])
    def test_equals_the_formula(self, causal):
        x, w = normal(9, 5), some_weights()
        z = x @ w.z
        z = z * torch.sigmoid(z)
        a = squared_relu_weights(z * w.gamma[0] + w.beta[0], z * w.gamma[1] + w.beta[1], causal=causal)
        out, _ = gated_attention_unit(x, w, causal=causal)
        assert (out - unit_by_hand(x, w, a)).abs().max() < 1e-12

    def test_softmax_equals_that_of_08(self):
        x, w = normal(9, 5), some_weights()
        z = torch.nn.functional.silu(x @ w.z)
        q, k = (z * w.gamma[i] + w.beta[i] for i in (0, 1))
        for causal in (True, False):
            a = softmax_attention(q, k, torch.eye(9, dtype=torch.float64), causal=causal)
            out, _ = gated_attention_unit(x, w, kernel="softmax", causal=causal)
            assert (out - unit_by_hand(x, w, a)).abs().max() < 1e-12

    @pytest.mark.parametrize("rotary", [False, True])
    @pytest.mark.parametrize("kernel", ["relu2", "softmax"])
    def test_separate_queries_and_keys(self, rotary, kernel):
        x, w = normal(9, 5), some_weights(s=4)
        w = w._replace(z=normal(5, 8, seed=7))
        z = nn.functional.silu(x @ w.z)
        q, k = (z[:, 4 * i : 4 * i + 4] * w.gamma[i] + w.beta[i] for i in (0, 1))
        if rotary:
            q, k = rotate(q), rotate(k)
        eye = torch.eye(9, dtype=torch.float64)
        a = squared_relu_weights(q, k) if kernel == "relu2" else softmax_attention(q, k, eye)
        out, _ = gated_attention_unit(x, w, rotary=rotary, kernel=kernel)
        assert (out - unit_by_hand(x, w, a)).abs().max() < 1e-12

    @given(n=st.integers(1, 9), c=st.integers(1, 9))
    def test_mixed_chunks_use_the_four_maps_in_order(self, n, c):
        x, w = normal(n, 5), some_weights(maps=4)
        z = torch.nn.functional.silu(x @ w.z)
        maps = [z * w.gamma[i] + w.beta[i] for i in range(4)]
        a = token_by_token(*maps, torch.eye(n, dtype=torch.float64), c, True)
        out, _ = gated_attention_unit(x, w, chunk_size=c)
        assert (out - unit_by_hand(x, w, a)).abs().max() < 1e-12

    def test_one_token_with_unit_weight_is_a_gated_linear_unit(self):
        x, w = normal(1, 5), some_weights(s=1)
        w = w._replace(gamma=torch.zeros(2, 1).double(), beta=torch.ones(2, 1).double())  # q = k = 1, so A = I
        u, v = (torch.nn.functional.silu(x @ m) for m in (w.u, w.v))
        assert (gated_attention_unit(x, w)[0] - (u * v) @ w.o).abs().max() < 1e-14

    @pytest.mark.parametrize(
        "setting",
        [
            {},
            {"chunk_size": 4},
            {"kernel": "softmax"},
            {"rotary": True},
            {"rotary": True, "chunk_size": 4},
            {"separate": True},
            {"separate": True, "chunk_size": 4},
        ],
        ids=str,
    )
    def test_a_layer_in_pieces_is_the_same(self, setting):
        torch.manual_seed(0)
        layer, x = GatedAttentionUnit(6, 8, 4, **setting).double(), normal(2, 13, 6)
        whole, _ = layer(x)
        state, parts = None, []
        for part in x.split([1, 2, 4, 5, 1], 1):
            out, state = layer(part, state)
            parts.append(out)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
        changed = x.clone()
        changed[:, 7:] += 1
        assert torch.equal(layer(changed)[0][:, :7], whole[:, :7])

    def test_half_precision(self):
        """Only the matrix products and the result are rounded to half precision, not A and what counts its keys."""
        torch.manual_seed(0)
        x = normal(400, 16, dtype=torch.bfloat16)
        for setting in ({}, {"kernel": "softmax"}, {"chunk_size": 300}):
            w = GatedAttentionUnit(16, 32, 8, **setting).to(torch.bfloat16).weights
            ours, _ = gated_attention_unit(x, w, **setting)
            exact, _ = gated_attention_unit(x.double(), Weights(*(part.double() for part in w)), **setting)
            assert ours.dtype == torch.bfloat16
            assert (ours.double() - exact).abs().max() < 0.015 * exact.abs().max(), setting

    @pytest.mark.parametrize(
        "setting, problem",
        [
            ({"kernel": "relu"}, 'kernel must be "relu2" or "softmax", got \'relu\''),
            ({"kernel": "softmax", "chunk_size": 2}, "mixed chunks go with kernel='relu2' only"),
            ({"chunk_size": 2}, r"gamma and beta must have shape \(4, 3\), got \(2, 3\) and \(2, 3\)"),
            ({"causal": False, "state": ()}, "a state goes with causal=True only"),
        ],
    )
    def test_what_cannot_be_is_named(self, setting, problem):
        with pytest.raises(ValueError, match=problem):
            gated_attention_unit(normal(4, 5), some_weights(), **setting)

    def test_weights_beyond_half_precision(self):
        """A is not rounded to float16 before it meets V: here it holds millions, and V thousandths."""
        torch.manual_seed(0)
        w = Weights(*(part.detach() for part in GatedAttentionUnit(16, 32, 8).double().weights))
        w = w._replace(v=w.v / 1000, gamma=20 * w.gamma, o=w.o / 100)
        x = normal(20, 16)
        exact = gated_attention_unit(x, w)[0]
        half = gated_attention_unit(x.half(), Weights(*(part.half() for part in w)))[0]
        assert (half.double() - exact).abs().max() < 0.01 * exact.abs().max()

    def test_scales_and_offsets_must_match(self):
        w = some_weights()
        with pytest.raises(ValueError, match=r"got \(2, 3\) and \(1, 3\)"):
            gated_attention_unit(normal(4, 5), w._replace(beta=w.beta[:1]))


class TestRotary:
    def test_equals_a_product_of_complex_numbers(self):
        x = normal(2, 9, 6)
        for start in (0, 5):
            angle = np.outer(np.arange(start, start + 9), 10_000.0 ** (-np.arange(3) / 3))
            turned = (x[..., :3].numpy() + 1j * x[..., 3:].numpy()) * np.exp(1j * angle)
            expected = np.concatenate([turned.real, turned.imag], -1)
            assert np.abs(rotate(x, start).numpy() - expected).max() < 1e-14

    @given(st.integers(0, 1000), st.integers(1, 6))
    def test_scores_depend_on_distances_only(self, start, half):
        q, k = normal(5, 2 * half), normal(5, 2 * half, seed=1)
        here, there = (rotate(q, at) @ rotate(k, at).mT for at in (0, start))
        assert (here - there).abs().max() < 1e-10

    def test_a_far_place_in_single_precision(self):
        """Angles in float32 would be off by 1e-2 after some hundred thousand tokens."""
        x = normal(1, 8)
        assert (rotate(x.float(), 500_001) - rotate(x, 500_001)).abs().max() < 1e-6

    def test_it_is_what_the_unit_turns_by(self):
        x, w = normal(9, 5), some_weights(s=4)
        z = nn.functional.silu(x @ w.z)
        a = squared_relu_weights(*(rotate(z * w.gamma[i] + w.beta[i]) for i in (0, 1)))
        assert (gated_attention_unit(x, w, rotary=True)[0] - unit_by_hand(x, w, a)).abs().max() < 1e-12

    def test_softmax_with_rotary_positions(self):
        q, k, v = (normal(1, 2, 9, 4, seed=i) for i in range(3))
        whole, _ = rotary_softmax(q, k, v)
        assert (whole - softmax_attention(rotate(q), rotate(k), v)).abs().max() < 1e-12
        state, parts = None, []
        for piece in zip(*(x.split([1, 3, 5], 2) for x in (q, k, v)), strict=True):
            part, state = rotary_softmax(*piece, state)
            parts.append(part)
        assert (torch.cat(parts, 2) - whole).abs().max() < 1e-12

    def test_odd_features_are_named(self):
        with pytest.raises(ValueError, match="even number of features, got 3"):
            rotate(normal(4, 3))


class TestModel:
    def test_as_many_parameters_as_the_transformer_of_08(self):
        block = AttentionBlock(64, 4, None)
        wanted = 2 * sum(p.numel() for p in block.parameters())
        for setting in ({}, {"chunk_size": 32}, {"kernel": "softmax"}, {"separate": True, "expanded": 107}):
            units = sum(p.numel() for p in flash_model(**setting).blocks.parameters())
            assert abs(units / wanted - 1) < 0.005

    def test_one_seed_is_one_model(self):
        a, b, other = (flash_model(seed) for seed in (3, 3, 4))
        assert torch.equal(a.blocks[2].u, b.blocks[2].u) and not torch.equal(a.blocks[2].u, other.blocks[2].u)

    def test_gradients_reach_every_parameter(self):
        model = flash_model(chunk_size=4)
        next_byte_loss(model, torch.arange(26).reshape(2, 13)).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.blocks.parameters())

    @torch.no_grad()
    def test_the_first_layer_is_a_normalised_start(self):
        """Standard normal u, v and z before their silu, so that the moments of 11_flash apply."""
        torch.manual_seed(0)
        unit, x = GatedAttentionUnit(256, 512, 128), normal(400, 256, dtype=torch.float32)
        for w in (unit.u, unit.v, unit.z):
            assert abs(float((unit.norm(x) @ w).std()) - 1) < 0.02
        assert abs(float(unit.o.std()) * math.sqrt(512) - 1) < 0.02

    def test_row_sums_of_the_meter(self):
        model, seen = flash_model(), []
        meter = RowMeter()
        meter(0, model)
        found = meter.result(model, length=20, pieces=3)
        text = load_bytes()[1]
        starts = np.linspace(0, len(text) - 21, 3).astype(int)
        x = torch.tensor(np.stack([text[i : i + 20] for i in starts]).astype(np.int64))
        model.blocks[0].register_forward_pre_hook(lambda _, given_: seen.append(given_[0]))
        model(x)
        unit = model.blocks[0]
        z = nn.functional.silu(unit.norm(seen[0]) @ unit.z)
        square = ((z @ z.mT).clamp(min=0) ** 2 / 32).tril()
        assert np.abs(found["row_sum"][0] - square.sum(-1).mean(0).detach().numpy()).max() < 1e-3
        keys = square.sum(-1) ** 2 / (square**2).sum(-1)
        assert np.abs(found["keys"][0] - keys.mean(0).detach().numpy()).max() < 1e-3
        assert found["keys"].shape == (4, 20)
        turned = flash_model(rotary=True)  # the same weights, other scores from the second token on
        other = meter.result(turned, length=20, pieces=3)["row_sum"][0]
        assert (
            abs(other[0] / found["row_sum"][0, 0] - 1) < 1e-5 and np.abs(other[5:] - found["row_sum"][0, 5:]).min() > 0
        )
        for model in (flash_model(chunk_size=4), flash_model(kernel="softmax"), transformer(rotary_softmax)):
            assert meter.result(model) == {}
        assert len(unit._forward_pre_hooks) == 1  # the meter's own are gone


class TestCost:
    @staticmethod
    def counted(blocks, n, d):
        """Multiplications of the blocks on one sequence, counted while they run on tensors without data."""
        with FlopCounterMode(display=False) as counter:
            x = torch.empty(1, n, d, device="meta")
            for block in blocks:
                x, _ = block(x)
        return counter.get_total_flops() // 2

    @settings(max_examples=12)
    @given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
    def test_transformer(self, n, half, heads):
        d = 2 * half * heads
        with torch.device("meta"):
            block = AttentionBlock(d, heads, lambda q, k, v, _: (softmax_attention(q, k, v), None))
        cost = transformer_cost(n, d, heads)
        assert cost.projections + cost.attention == self.counted([block], n, d)
        matrices = [p for name, p in block.named_parameters() if p.ndim == 2]
        assert cost.parameters == sum(p.numel() for p in matrices) and cost.scores == heads * n**2

    @settings(max_examples=20)
    @given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 70))
    def test_units(self, n, d, e, s, c):
        chunk_size = c or None
        with torch.device("meta"):
            units = [GatedAttentionUnit(d, e, s, chunk_size=chunk_size) for _ in range(2)]
        cost = gau_cost(n, d, e, s, chunk_size=chunk_size)
        # linear_attention carries a column of ones beside the e of v.
        wider = gau_cost(n, d, e + 1, s, chunk_size=chunk_size)
        column = wider.attention - cost.attention - cost.scores
        assert cost.projections + cost.attention + column == self.counted(units, n, d)
        assert cost.parameters == 2 * sum(w.numel() for w in (units[0].u, units[0].v, units[0].z, units[0].o))

    def test_known_sizes(self):
        """The sizes of kexue.fm 8934: 12 heads of 64, e = 2d, s = 128; n = 4096 and c = 256."""
        mha, quadratic = transformer_cost(4096, 768, 12), gau_cost(4096, 768, 1536, 128)
        flash = gau_cost(4096, 768, 1536, 128, chunk_size=256)
        assert (mha.parameters, quadratic.parameters) == (7_077_888, 7_274_496)
        assert (mha.attention // 4096**2, quadratic.attention // 4096**2) == (1536, 3328)
        assert mha.scores == 6 * quadratic.scores
        gflop = [round(2 * (cost.projections + cost.attention) / 1e9, 1) for cost in (mha, quadratic, flash)]
        assert gflop == [109.5, 171.3, 72.6]

    @given(st.integers(1, 30), st.integers(1, 40))
    def test_a_chunk_as_long_as_the_text_costs_the_same(self, n, more):
        assert gau_cost(n, 4, 8, 2, chunk_size=n + more - 1) == gau_cost(n, 4, 8, 2)

    def test_what_cannot_be_is_named(self):
        with pytest.raises(ValueError, match="s must be a whole number of at least 1, not 0"):
            gau_cost(4, 4, 4, 0)
        with pytest.raises(ValueError, match="chunk_size must be a whole number of at least 1, not -1"):
            gau_cost(4, 4, 4, 4, chunk_size=-1)
        with pytest.raises(ValueError, match="heads must be a whole number"):
            transformer_cost(4, 4, 1.5)


def test_the_state_of_chunks_is_a_named_tuple():
    _, state = mixed_chunk_attention(*inputs(5), chunk_size=2)
    assert isinstance(state, ChunkState) and state._fields == ("far", "before", "c", "k", "k_lin", "v")
    assert (state.before, state.c) == (4, 2)


class TestWatch:
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_the_peak_is_what_lives_at_one_time(self, device):
        x = torch.zeros(100, device=device)  # 400 bytes, made outside: not seen
        with Watch(7) as watch:
            y = x + 1
            z = y + 1
            del y
            view = z[:50] * 1  # 200 bytes; z[:50] is a view of z
            w = (z + 1) + 1
        assert watch.peak == 400 + 200 + 400 + 400 and watch.scores == 0
        assert len(view) == 50 and len(w) == 100

    def test_scores_are_square_results_of_products(self):
        x = torch.zeros(3, 7, 2, device="meta")
        with Watch(7) as watch:
            a = x @ x.mT
            _ = (a * 2) @ x
            _ = x[0] @ x[1].mT
        assert watch.scores == 4 * 49

    def test_a_layer_that_keeps_its_scores(self):
        """Two tensors of n × n for the backward pass: the relu, which its square needs, and A, which A V needs."""
        kept = {}

        def pack(x):
            kept[x.untyped_storage()._cdata] = x
            return x

        with torch.device("meta"):
            unit, x = GatedAttentionUnit(4, 8, 2), torch.empty(1, 50, 4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            unit(x)[0].sum()
        assert sum(x.shape[-2:] == (50, 50) for x in kept.values()) == 2

"""Efficient attention against torch's SDPA and FlexAttention, brute force, gradients and closed forms."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers.efficient_attention import (
    atrous,
    attention,
    block_layout,
    block_sparse_attention,
    cosformer_attention,
    either,
    fixed,
    iterative_pinv,
    linformer_attention,
    local,
    lsh_buckets,
    lsh_collision,
    multiplications,
    nystrom_attention,
    nystrom_factors,
    online_attention,
    pattern_matrix,
    reachable,
    same_bucket,
    strided,
)


def normal(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def qkv(*shape, seed=0, dtype=torch.float64):
    return tuple(normal(*shape, seed=3 * seed + part, dtype=dtype) for part in range(3))


def sdpa(q, k, v, mask=None):
    four = [x[(None,) * (4 - x.ndim)] for x in (q, k, v)]  # its fast kernels want four axes
    return F.scaled_dot_product_attention(*four, attn_mask=mask).reshape(*q.shape[:-1], v.shape[-1])


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


PATTERNS = {
    "local": lambda s: local(s),
    "local both": lambda s: local(s, causal=False),
    "atrous": lambda s: atrous(s),
    "atrous both": lambda s: atrous(s, causal=False),
    "strided": lambda s: either(*strided(s)),
    "fixed": lambda s: either(*fixed(s)),
    "summaries only": lambda s: fixed(s)[1],  # its first queries may attend nowhere
    "nothing": lambda s: lambda i, j: (i + j) < 0,
    "future only": lambda s: lambda i, j: j > i,  # the last query may attend nowhere
    "columns": lambda s: lambda i, j: j % s == 0,  # does not depend on i
}
any_pattern = st.sampled_from(sorted(PATTERNS))


class TestCost:
    @pytest.mark.parametrize("n, heads, d", [(1, 1, 1), (5, 3, 4), (64, 12, 64), (200, 2, 8)])
    def test_equals_torchs_count(self, n, heads, d):
        """On the meta device nothing is computed, only counted; a FLOP counter counts two for a multiplication."""
        width = heads * d
        shapes = (n, width), (width, width), (width, 4 * width), (4 * width, width)
        x, w, w1, w2 = (torch.empty(*shape, device="meta") for shape in shapes)
        q = torch.empty(heads, n, d, device="meta")
        cost = multiplications(n, heads, d)
        assert 2 * cost.projections == 4 * flops(lambda: x @ w)
        assert 2 * cost.scores == flops(lambda: (q @ q.mT) @ q)
        assert 2 * cost.feed_forward == flops(lambda: (x @ w1) @ w2)

    @given(st.integers(1, 20), st.integers(1, 128))
    def test_the_crossings(self, heads, d):
        def more_than_feed_forward(n):
            cost = multiplications(n, heads, d)
            return cost.projections + cost.scores > cost.feed_forward

        def more_than_all_else(n):
            cost = multiplications(n, heads, d)
            return cost.scores > cost.projections + cost.feed_forward

        for first, crossed in ((2, more_than_feed_forward), (6, more_than_all_else)):
            assert not crossed(first * heads * d) and crossed(first * heads * d + 1)

    def test_bert_base(self):
        assert multiplications(1536, 12, 64).scores == 4 * 1536 * 768**2


class TestPatterns:
    @given(st.integers(1, 30), st.integers(1, 12))
    def test_are_the_sets_of_the_papers(self, n, l):  # noqa: E741
        wanted = {
            "local": lambda i, j: i - l <= j <= i,
            "local both": lambda i, j: abs(i - j) <= l,
            "atrous": lambda i, j: j <= i and j in range(i, -1, -l),
            "atrous both": lambda i, j: i in range(j % l, n, l),
            "strided": lambda i, j: j in {*range(max(0, i - l), i + 1), *range(i, -1, -l)},
            "fixed": lambda i, j: j <= i and (j // l == i // l or (j + 1) % l == 0),
        }
        for name, inside in wanted.items():
            brute = [[inside(i, j) for j in range(n)] for i in range(n)]
            assert pattern_matrix(PATTERNS[name](l), n).tolist() == brute, name

    @given(st.integers(1, 8), st.data())
    def test_fixed_has_several_summaries(self, step, data):
        summaries = data.draw(st.integers(1, step))
        table = pattern_matrix(fixed(step, summaries)[1], 4 * step)[-1]
        assert table.reshape(4, step).tolist() == [[False] * (step - summaries) + [True] * summaries] * 4

    @given(st.integers(1, 12), st.integers(1, 12))
    def test_counts(self, step, blocks):
        """Closed forms of section 2, for n = step · blocks."""
        n = step * blocks
        near, far = (int(pattern_matrix(p, n).sum()) for p in strided(step))
        own, summary = (int(pattern_matrix(p, n).sum()) for p in fixed(step))
        assert near == n * (step + 1) - step * (step + 1) // 2
        assert far == step * blocks * (blocks + 1) // 2
        assert own == n * (step + 1) // 2
        assert summary == n * blocks - step * blocks * (blocks + 1) // 2 + blocks

    def test_rectangular(self):
        assert pattern_matrix(local(1), 2, 5).tolist() == [[True] + [False] * 4, [True] * 2 + [False] * 3]
        assert pattern_matrix(lambda i, j: j < 2, 3, 4).shape == (3, 4)  # broadcast from one row

    def test_bad_input(self):
        for build in (local, atrous, strided, fixed):
            with pytest.raises(ValueError, match="must be at least 1, got 0"):
                build(0)
            with pytest.raises(TypeError, match=r"must be an integer, got 1\.5"):
                build(1.5)
        with pytest.raises(TypeError, match="got True"):
            local(True)
        with pytest.raises(ValueError, match="between 1 and the step 4, got 5"):
            fixed(4, 5)
        with pytest.raises(ValueError, match="at least one pattern"):
            either()
        with pytest.raises(ValueError, match=r"\(rounds, n\), got \(3,\)"):
            same_bucket(torch.zeros(3))


class TestReachable:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 14), st.integers(1, 5), st.lists(any_pattern, min_size=1, max_size=3))
    def test_is_where_something_arrives(self, n, step, names):
        masks = [pattern_matrix(PATTERNS[name](step), n) for name in names]
        y = torch.eye(n, dtype=torch.float64)  # all weights are positive, so nothing cancels
        for mask in masks:
            y = attention(torch.zeros(n, 1, dtype=y.dtype), torch.zeros(n, 1, dtype=y.dtype), y, mask)
        assert (y > 0).tolist() == reachable(masks).tolist()

    @pytest.mark.parametrize("window, n", [(1, 5), (3, 10), (4, 9), (16, 256), (16, 257), (16, 258)])
    def test_layers_for_a_window(self, window, n):
        layers = math.ceil((n - 1) / window)
        mask = pattern_matrix(local(window), n)
        assert reachable([mask] * layers)[-1, 0] and not (layers > 1 and reachable([mask] * (layers - 1))[-1, 0])

    @pytest.mark.parametrize("n", [64, 256, 1024])
    def test_strided_and_fixed_in_two_layers(self, n):
        past = torch.ones(n, n).tril() > 0
        near, far = (pattern_matrix(p, n) for p in strided(math.isqrt(n)))
        own, summary = (pattern_matrix(p, n) for p in fixed(math.isqrt(n)))
        assert reachable([near, far]).equal(past) and reachable([far, near]).equal(past)
        assert not reachable([own, summary]).equal(past)
        assert reachable([own | summary] * 2).equal(past)

    def test_the_order_matters(self):
        a, b = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
        a[1, 0] = b[2, 1] = True  # first 0 → 1, then 1 → 2
        assert reachable([a, b]).nonzero().tolist() == [[2, 0]] and not reachable([b, a]).any()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least one layer"):
            reachable([])
        for bad in (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match="square tensor of booleans"):
                reachable([bad])


class TestAttention:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 20), st.integers(1, 6), any_pattern)
    def test_equals_sdpa(self, n, step, name):
        q, k, v = qkv(2, n, 5)
        mask = pattern_matrix(PATTERNS[name](step), n)
        assert (attention(q, k, v, mask) - sdpa(q, k, v, mask)).abs().max() < 1e-14

    def test_without_a_mask_and_with_other_sizes(self):
        q, k, v = normal(3, 7, 4), normal(3, 9, 4, seed=1), normal(3, 9, 6, seed=2)
        assert (attention(q, k, v) - sdpa(q, k, v)).abs().max() < 1e-14
        assert (attention(q, k, v, scale=2.0) - (2 * q @ k.mT).softmax(-1) @ v).abs().max() < 1e-14

    def test_a_query_without_keys_gives_zeros_and_clean_gradients(self):
        q, k, v = (x.requires_grad_() for x in qkv(4, 3))
        mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # the first query has no key
        for result in (
            attention(q, k, v, mask),
            block_sparse_attention(q, k, v, lambda i, j: j < i, block=2),
            online_attention(q, k, v, 2, lambda i, j: j < i),
        ):
            assert (result[0] == 0).all() and (result[1] - v[0]).abs().max() < 1e-15
            for gradient in torch.autograd.grad(result.sum(), (q, k, v)):
                assert gradient.isfinite().all()

    def test_a_mask_saves_nothing(self):
        q, k, v = qkv(2, 64, 8)
        mask = pattern_matrix(local(4), 64)
        assert flops(lambda: attention(q, k, v, mask)) == flops(lambda: attention(q, k, v))

    def test_bad_input(self):
        q, k, v = qkv(4, 3)
        with pytest.raises(TypeError, match=r"True = may attend\), got torch.float64"):
            attention(q, k, v, torch.zeros(4, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match="keys, width"):
            attention(q, k[:, :2], v)
        with pytest.raises(ValueError, match="keys, width"):
            attention(q, k, v[:3])
        with pytest.raises(ValueError, match="keys, width"):
            attention(q[0], k, v)
        with pytest.raises(TypeError, match="one floating dtype"):
            attention(q, k, v.float())
        with pytest.raises(TypeError, match="one floating dtype"):
            attention(*(x.long() for x in (q, k, v)))
        with pytest.raises(ValueError, match="at least one query, key and feature"):
            attention(q, k[:0], v[:0])


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation returns, and remembers the size of the largest."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class TestBlockSparse:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 40), st.integers(1, 9), any_pattern, st.integers(1, 17), st.booleans())
    def test_equals_sdpa(self, n, step, name, block, shuffled):
        q, k, v = qkv(2, n, 4)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n)) if shuffled else None
        ours = block_sparse_attention(q, k, v, PATTERNS[name](step), block=block, order=order)
        assert (ours - sdpa(q, k, v, pattern_matrix(PATTERNS[name](step), n))).abs().max() < 1e-14

    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 40), st.integers(1, 40), any_pattern, st.integers(1, 9), st.integers(1, 17))
    def test_layout_holds_exactly_the_touched_blocks(self, queries, keys, name, step, block):
        table = pattern_matrix(PATTERNS[name](step), queries, keys)
        brute = [[bool(b.any()) for b in row.split(block, 1)] for row in table.split(block, 0)]
        assert block_layout(PATTERNS[name](step), queries, keys, block).tolist() == brute

    def test_other_sizes(self):
        q, k, v = normal(3, 2, 37, 4), normal(3, 1, 50, 4, seed=1), normal(1, 2, 50, 6, seed=2)
        pattern = local(9, causal=False)
        dense = attention(q, k, v, pattern_matrix(pattern, 37, 50))
        assert (block_sparse_attention(q, k, v, pattern, block=8) - dense).abs().max() < 1e-14
        assert (block_sparse_attention(q, k, v, pattern, block=8, scale=3.0) - dense).abs().max() > 0.1

    @pytest.mark.parametrize("width", [10, 40, 200])
    def test_work_is_proportional_to_the_number_of_blocks(self, width):
        q, k, v = qkv(2, 256, 8)
        layout = block_layout(local(width), 256, block=16)
        per_block = 2 * 2 * 2 * 8 * 16**2  # heads, products, a multiplication and an addition, features, pairs
        counted = flops(lambda: block_sparse_attention(q, k, v, local(width), layout, block=16))
        assert counted == per_block * int(layout.sum())

    def test_nothing_of_size_n_by_n_is_made(self):
        q, k, v = qkv(1, 512, 4)
        layout = block_layout(local(20), 512, block=16)
        with Largest() as sparse:
            block_sparse_attention(q, k, v, local(20), layout, block=16)
        with Largest() as dense:
            attention(q, k, v, pattern_matrix(local(20), 512))
        with Largest() as online:
            online_attention(q, k, v, 16)
        assert dense.elements == 512**2
        assert sparse.elements <= 512 * 4 and online.elements <= 512 * 16

    def test_a_reordering_makes_strided_dense(self):
        """Sorted by i mod l, every l-th key is a block on the diagonal: 1/l of all blocks."""
        order = (torch.arange(256) % 16).argsort(stable=True)
        assert block_layout(atrous(16), 256, block=16).sum() == 16 * 17 // 2
        assert block_layout(atrous(16), 256, block=16, order=order).tolist() == torch.eye(16).bool().tolist()

    def test_gradients_equal_those_of_the_dense_one(self):
        parts = [[x.requires_grad_() for x in qkv(30, 4)] for _ in range(2)]
        pattern = either(*strided(5))
        ours = block_sparse_attention(*parts[0], pattern, block=8).square().sum()
        theirs = attention(*parts[1], pattern_matrix(pattern, 30)).square().sum()
        for a, b in zip(torch.autograd.grad(ours, parts[0]), torch.autograd.grad(theirs, parts[1]), strict=True):
            assert (a - b).abs().max() < 1e-13

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
    def test_other_dtypes(self, dtype, tolerance):
        q, k, v = qkv(2, 70, 16, dtype=dtype)
        exact = attention(q.double(), k.double(), v.double(), pattern_matrix(local(20), 70))
        for ours in (
            block_sparse_attention(q, k, v, local(20), block=16),
            online_attention(q, k, v, 16, local(20)),
            attention(q, k, v, pattern_matrix(local(20), 70)),
        ):
            assert ours.dtype == dtype and (ours.double() - exact).abs().max() < tolerance

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_products_beyond_the_range_of_float16(self, dtype):
        """q·k is up to 102,400, more than float16 holds, but 12,800 after scaling: SDPA is finite, and so are we."""
        q = torch.full((1, 1, 8, 64), 40.0, dtype=dtype)
        k = q * torch.linspace(0.99, 1, 8)[:, None].to(dtype)
        v = normal(1, 1, 8, 4, dtype=dtype)
        exact = sdpa(q.double(), k.double(), v.double())
        for ours in (
            attention(q, k, v),
            block_sparse_attention(q, k, v, atrous(1, causal=False), block=4),
            online_attention(q, k, v, 4),
            linformer_attention(q, k, v, *[torch.eye(8, dtype=dtype)] * 2),
        ):
            assert ours.dtype == dtype and (ours.double() - exact).abs().max() < 0.02

    def test_equals_flex_attention(self):
        q, k, v = qkv(1, 2, 100, 8)
        pattern = either(*strided(10))
        mask = create_block_mask(lambda b, h, i, j: pattern(i, j), None, None, 100, 100, device="cpu", BLOCK_SIZE=16)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            theirs = flex_attention(q, k, v, block_mask=mask)
        assert (block_sparse_attention(q, k, v, pattern, block=16) - theirs).abs().max() < 1e-14
        theirs = mask.to_dense()[0, 0].bool()
        assert block_layout(pattern, 100, block=16).tolist() == theirs.tolist()

    def test_bad_input(self):
        q, k, v = qkv(10, 3)
        with pytest.raises(ValueError, match=r"layout has shape \(3, 3\), which does not fit blocks of 2"):
            block_sparse_attention(q, k, v, local(2), block_layout(local(2), 10, block=4), block=2)
        with pytest.raises(ValueError, match="block must be at least 1"):
            block_layout(local(2), 10, block=0)
        with pytest.raises(ValueError, match="block must be at least 1"):
            block_sparse_attention(q, k, v, local(2), block_layout(local(2), 10, block=4), block=0)
        for order in (torch.zeros(10, dtype=torch.long), torch.arange(9), torch.arange(1, 11)):
            with pytest.raises(ValueError, match="order must be a permutation of the 10 positions"):
                block_sparse_attention(q, k, v, local(2), order=order)
        with pytest.raises(ValueError, match="alike"):
            block_sparse_attention(q[:5], k, v, local(2), order=torch.arange(5))


class TestOnline:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 40), st.integers(1, 50), any_pattern, st.integers(1, 6))
    def test_equals_sdpa(self, n, block, name, step):
        q, k, v = qkv(2, n, 4)
        ours = online_attention(q, k, v, block, PATTERNS[name](step))
        assert (ours - sdpa(q, k, v, pattern_matrix(PATTERNS[name](step), n))).abs().max() < 1e-14

    def test_softmax_to_the_last_digits(self):
        """With the identity as values the result is the matrix of weights."""
        q, k, _ = qkv(300, 8)
        weights = online_attention(q, k, torch.eye(300, dtype=torch.float64), 7)
        assert (weights - (q @ k.T / math.sqrt(8)).softmax(-1)).abs().max() < 1e-15

    @pytest.mark.parametrize("shift", [-1e5, 1e5])
    def test_large_scores_do_not_overflow(self, shift):
        """A shift of all scores changes nothing; exp(1e5) would be infinite, exp(-1e5) zero."""
        scores = normal(1, 40, scale=30.0)
        one = torch.ones(1, 1, dtype=torch.float64)
        ours = online_attention(one, (scores + shift).mT, normal(40, 3, seed=1), 8, scale=1.0)
        assert (ours - scores.softmax(-1) @ normal(40, 3, seed=1)).abs().max() < 1e-10

    def test_rising_and_falling_scores(self):
        """Rising scores rescale at each block, falling ones never."""
        one, values = torch.ones(1, 1, dtype=torch.float64), normal(64, 2)
        for scores in (torch.linspace(-300, 300, 64), torch.linspace(300, -300, 64)):
            scores = scores.double()[None]
            ours = online_attention(one, scores.mT, values, 4, scale=1.0)
            assert (ours - scores.softmax(-1) @ values).abs().max() < 1e-14

    def test_gradients_equal_those_of_the_dense_one(self):
        parts = [[x.requires_grad_() for x in qkv(30, 4)] for _ in range(2)]
        ours, theirs = online_attention(*parts[0], 7, local(9)), attention(*parts[1], pattern_matrix(local(9), 30))
        for a, b in zip(
            torch.autograd.grad(ours.square().sum(), parts[0]),
            torch.autograd.grad(theirs.square().sum(), parts[1]),
            strict=True,
        ):
            assert (a - b).abs().max() < 1e-13

    def test_half_precision_keeps_its_sums_in_float32(self):
        """4096 equal weights: in bfloat16 the sum of ones would stop at 256."""
        zero, values = torch.zeros(4096, 1, dtype=torch.bfloat16), torch.zeros(4096, 1, dtype=torch.bfloat16)
        values[:256] = 1
        assert online_attention(zero[:1], zero, values, 1).item() == 256 / 4096

    def test_a_gradient_costs_more_memory_than_the_dense_program(self):
        """What the docstring warns of: autograd keeps the pieces of every step."""

        def kept(function):
            storages = {}

            def pack(x):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = function(*(x.requires_grad_() for x in qkv(512, 8)))
            return result, sum(storages.values())

        (_, online), (_, dense) = kept(lambda *x: online_attention(*x, 32)), kept(attention)
        assert online > dense >= 512**2 * 8

    def test_bad_input(self):
        with pytest.raises(ValueError, match="block must be at least 1, got 0"):
            online_attention(*qkv(4, 3), 0)


class TestHashing:
    @pytest.mark.parametrize("buckets", [2, 4, 16, 64])
    def test_collisions_as_often_as_computed(self, buckets):
        draws = 20_000
        for angle in (20, 60, 90, 150):
            pair = torch.zeros(2, 6, dtype=torch.float64)
            pair[0, 0] = 1
            pair[1, 0], pair[1, 1] = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            found = lsh_buckets(pair, buckets, draws, torch.Generator().manual_seed(angle))
            often = (found[:, 0] == found[:, 1]).double().mean().item()
            p = float(lsh_collision(angle, buckets))
            assert abs(often - p) < 4.5 * math.sqrt(p * (1 - p) / draws) + 1e-3

    @given(st.floats(5, 175))
    def test_two_buckets_are_a_random_plane(self, angle):
        assert abs(lsh_collision(angle, 2) - (1 - angle / 180)) < 1e-3

    def test_right_angles_and_ends(self):
        for buckets in (2, 8, 32, 128):
            assert abs(lsh_collision(90, buckets) - 1 / buckets) < 1e-4
        assert lsh_collision([0, 180], 8).tolist() == [1, 0]

    def test_only_directions_count_and_opposites_never_meet(self):
        x = normal(50, 8)
        found = [lsh_buckets(y, 16, 5, torch.Generator().manual_seed(1)) for y in (x, 3 * x, -x)]
        assert found[0].equal(found[1]) and not (found[0] == found[2]).any()
        assert found[0].shape == (5, 50) and found[0].min() >= 0 and found[0].max() < 16
        assert ((found[0] + 8) % 16).equal(found[2])

    def test_same_bucket(self):
        buckets = torch.tensor([[0, 1, 0, 2], [5, 5, 6, 7]])
        brute = [[any(b[i] == b[j] for b in buckets.tolist()) for j in range(4)] for i in range(4)]
        assert pattern_matrix(same_bucket(buckets), 4).tolist() == brute

    def test_bad_input(self):
        for function in (lambda b: lsh_buckets(normal(3, 2), b), lambda b: lsh_collision(30, b)):
            for bad in (0, 3, -2):
                with pytest.raises(ValueError, match=f"even number of at least 2, got {bad}"):
                    function(bad)
        with pytest.raises(ValueError, match=r"\(n, d\), got \(3,\)"):
            lsh_buckets(normal(3), 4)
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            lsh_buckets(normal(3, 2), 4, 0)
        with pytest.raises(ValueError, match="between 5 and 175 degrees, got 2"):
            lsh_collision(2, 4)


class TestLowRank:
    def test_linformer_by_loops(self):
        q, k, v = qkv(12, 4)
        e, f = normal(3, 12, seed=8), normal(3, 12, seed=9)
        for i in range(12):
            mixed_k = [sum(e[m, j] * k[j] for j in range(12)) for m in range(3)]
            mixed_v = [sum(f[m, j] * v[j] for j in range(12)) for m in range(3)]
            weights = np.exp([float(q[i] @ x) / 2 for x in mixed_k])
            wanted = sum(w * x for w, x in zip(weights / weights.sum(), mixed_v, strict=True))
            assert (linformer_attention(q, k, v, e, f)[i] - wanted).abs().max() < 1e-13

    def test_linformer_without_mixing_is_exact(self):
        q, k, v = qkv(2, 9, 4)
        one = torch.eye(9, dtype=torch.float64)
        assert (linformer_attention(q, k, v, one, one) - sdpa(q, k, v)).abs().max() < 1e-14

    @pytest.mark.parametrize("n, d", [(16, 8), (64, 16), (64, 64), (128, 32)])
    def test_nystrom_with_every_token_a_landmark_is_exact(self, n, d):
        q, k, v = qkv(n, d, seed=2)
        assert (nystrom_attention(q, k, v, n, None) - sdpa(q, k, v)).abs().max() < 1e-11
        assert (nystrom_attention(q, k, v, n, 30) - sdpa(q, k, v)).abs().max() < 1e-7

    def test_nystrom_is_exact_for_constant_segments(self):
        """Four different tokens, each eight times: four landmarks are all there is to know."""
        q, k = (normal(4, 5, seed=s).repeat_interleave(8, 0) for s in (1, 2))
        left, inverse, right = nystrom_factors(q, k, 4, None)
        assert left.shape == (32, 4) and inverse.shape == (4, 4) and right.shape == (4, 32)
        full = (q @ k.T / math.sqrt(5)).softmax(-1)
        assert (left @ inverse @ right - full).abs().max() < 1e-12

    def test_nystrom_takes_batches(self):
        q, k, v = qkv(2, 3, 24, 4)
        one_by_one = [[nystrom_attention(q[a, b], k[a, b], v[a, b], 6) for b in range(3)] for a in range(2)]
        assert (nystrom_attention(q, k, v, 6) - torch.stack([torch.stack(x) for x in one_by_one])).abs().max() < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("iterations", [6, None])
    def test_half_precision(self, dtype, iterations):
        """Queries and keys so near to each other that the pseudo-inverse has entries in the thousands."""
        q, k, v = (x.to(dtype) for x in (normal(32, 8, scale=0.05), normal(32, 8, seed=1, scale=0.05), normal(32, 8)))
        wanted = nystrom_attention(q.double(), k.double(), v.double(), 8, 6)
        ours = nystrom_attention(q, k, v, 8, iterations)
        assert ours.dtype == dtype and ours.isfinite().all()
        if iterations:
            assert (ours.double() - wanted).abs().max() < 0.02

    def test_the_pseudo_inverse_of_zero_is_zero(self):
        one = torch.eye(3, dtype=torch.float64)
        result = iterative_pinv(torch.stack([one, 0 * one]), 20)
        assert (result - torch.stack([one, 0 * one])).abs().max() < 1e-12

    @pytest.mark.parametrize("m", [3, 10])
    def test_iteration(self, m):
        a = normal(m, m, seed=m).softmax(-1)
        one = torch.eye(m, dtype=torch.float64)
        errors = [one - a @ iterative_pinv(a, k) for k in range(4)]
        for before, after in itertools.pairwise(errors):
            assert ((3 * torch.matrix_power(before, 3) + torch.matrix_power(before, 4)) / 4 - after).abs().max() < 1e-10
        assert (iterative_pinv(a, 40) - torch.linalg.pinv(a)).abs().max() < 1e-6
        assert (iterative_pinv(a, 0) - a.T / a.abs().sum(0).max()).abs().max() < 1e-12  # its rows sum to 1

    def test_bad_input(self):
        q, k, v = qkv(12, 4)
        with pytest.raises(ValueError, match="must divide the number of queries and keys, got 5 for 12"):
            nystrom_attention(q, k, v, 5)
        with pytest.raises(ValueError, match="must divide"):
            nystrom_attention(q[:6], k, v, 3)
        with pytest.raises(ValueError, match="landmarks must be at least 1"):
            nystrom_attention(q, k, v, 0)
        with pytest.raises(ValueError, match=r"square matrices, got shape \(2, 3\)"):
            iterative_pinv(normal(2, 3))
        with pytest.raises(ValueError, match=r"e must have shape \(m, 12\), one m for both, got \(3, 11\)"):
            linformer_attention(q, k, v, normal(3, 11), normal(3, 12))
        with pytest.raises(ValueError, match="f must have shape"):
            linformer_attention(q, k, v, normal(3, 12), normal(4, 12))


class TestCosformer:
    @given(st.integers(1, 12))
    def test_equals_the_sum_over_pairs(self, n):
        q, k, v = (x.abs() + 0.01 for x in qkv(n, 3))
        for i in range(n):
            weights = torch.stack([q[i] @ k[j] * math.cos(math.pi * (i - j) / 2 / n) for j in range(n)])
            wanted = (weights[:, None] * v).sum(0) / weights.sum()
            assert (cosformer_attention(q, k, v)[i] - wanted).abs().max() < 1e-13

    def test_negative_features_count_as_zero_and_no_weight_gives_zeros(self):
        q, k, v = qkv(6, 3)
        q[2] = -1.0
        result = cosformer_attention(q, k, v)
        assert (result[2] == 0).all() and result.isfinite().all()
        assert (cosformer_attention(q.relu(), k.relu(), v) - result).abs().max() < 1e-15

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_beyond_the_range_of_float16(self, dtype):
        q, k, v = (x.to(dtype) for x in (*qkv(8192, 64)[:2], normal(8192, 2, seed=2) + 1))
        exact = cosformer_attention(q.double(), k.double(), v.double())
        assert (cosformer_attention(q, k, v).double() - exact).abs().max() < 0.02

    def test_is_linear_in_n(self):
        counts = [flops(lambda n=n: cosformer_attention(*qkv(n, 4))) for n in (100, 200)]
        assert counts[1] == 2 * counts[0]

"""Stochastic approximation against closed forms, listed outcomes, simulation and numpy."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.data import load_nile
from helpers.stochastic_approximation import (
    linear_mse,
    polyak_ruppert,
    power_steps,
    robbins_monro,
    running_mean,
    stochastic_gradient_descent,
)

streams = hnp.arrays(float, hnp.array_shapes(min_dims=1, max_dims=3, max_side=30), elements=st.floats(-1e6, 1e6))


class TestRunningMean:
    @given(streams)
    def test_equals_numpy_on_every_prefix(self, x):
        expected = [x[: k + 1].mean(axis=0) for k in range(len(x))]
        np.testing.assert_allclose(running_mean(x), expected, rtol=0, atol=1e-13 * max(1, np.abs(x).max()) * len(x))

    def test_on_the_nile(self):
        _, flow = load_nile()
        assert running_mean(flow)[-1] == pytest.approx(919.35, abs=1e-12)

    def test_keeps_float32_and_stalls_there(self):
        x = (1e4 + np.random.default_rng(0).normal(size=10**6)).astype(np.float32)
        means, truth = running_mean(x), x.mean(dtype=float)
        assert means.dtype == np.float32
        assert np.cumsum(x)[-1] / 1e6 - truth == pytest.approx(130.75, abs=0.01)  # the running sum
        assert abs(means[-1] - truth) < 0.02
        assert (means[10_000:] == means[-1]).all()  # (w - x)/k is below half of the spacing of floats near 1e4

    def test_integers_become_floats(self):
        assert running_mean([1, 2, 4]).tolist() == pytest.approx([1, 1.5, 7 / 3])

    @pytest.mark.parametrize("bad", [[], 3.0, [1.0, np.nan], [np.inf]])
    def test_bad_streams(self, bad):
        with pytest.raises(ValueError, match="observations must be"):
            running_mean(bad)


class TestPowerSteps:
    def test_values(self):
        assert power_steps(1, 4).tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
        assert power_steps(2, 3, scale=3, shift=1).tolist() == pytest.approx([3 / 4, 3 / 9, 3 / 16])
        assert power_steps(0, 2, scale=0.1).tolist() == [0.1, 0.1]

    @pytest.mark.parametrize("bad", [{"count": 0}, {"count": 3, "scale": 0}, {"count": 3, "shift": -1}])
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match="need count ≥ 1, scale > 0 and shift > -1"):
            power_steps(1, **bad)


class TestRobbinsMonro:
    def test_by_hand(self):
        path = robbins_monro(lambda w, k: 2 * w - k, 1.0, [0.5, 0.25])  # 1 - ½(2-1) = ½; ½ - ¼(1-2) = ¾
        assert path.tolist() == [1.0, 0.5, 0.75]

    @given(streams)
    def test_is_the_running_mean_for_g_equal_w_minus_x(self, x):
        path = robbins_monro(lambda w, k: w - x[k - 1], np.zeros(x.shape[1:]), power_steps(1, len(x)))
        np.testing.assert_allclose(path[1:], running_mean(x), rtol=0, atol=1e-13 * max(1, np.abs(x).max()) * len(x))

    def test_start_is_kept_half_by_squared_steps(self):
        path = robbins_monro(lambda w, k: w, 10.0, power_steps(2, 10_000, shift=1))
        np.testing.assert_allclose(path[1:] / 10, [(k + 2) / (2 * (k + 1)) for k in range(1, 10_001)], rtol=1e-11)
        assert path[-1] == pytest.approx(5.0005, abs=1e-6)

    def test_quantile_reaches_the_efficient_variance(self):
        q, count, runs = 0.9, 5000, 4000
        density = NormalDist().pdf(NormalDist().inv_cdf(q))
        rng = np.random.default_rng(1)
        steps = power_steps(1, count, scale=1 / density, shift=10)
        w = robbins_monro(lambda w, k: (rng.normal(size=runs) <= w) - q, np.zeros(runs), steps)[-1]
        assert w.mean() == pytest.approx(1.28155, abs=0.003)
        assert count * w.var() == pytest.approx(q * (1 - q) / density**2, rel=4 * np.sqrt(2 / runs))  # 2.922

    def test_the_cubic_needs_small_first_steps(self):
        def lost(shift):
            rng = np.random.default_rng(2)
            steps = power_steps(1, 500, shift=shift)
            noisy = robbins_monro(
                lambda w, k: w**3 - 5 + rng.normal(size=1000), np.zeros(1000), steps, freeze_beyond=1e3
            )
            return (np.abs(noisy[-1]) > 1e3).mean()

        assert lost(0) > 0.97
        assert lost(9) == 0

    @pytest.mark.parametrize(
        "start, arrives",
        [(1.5, False), (1.62, True), (1.76, True), (1.8, False), (1.9, True), (2.0, True), (2.2, False)],
    )
    def test_the_cubic_s_two_islands_of_starts(self, start, arrives):
        path = robbins_monro(lambda w, k: w**3 - 5, start, power_steps(1, 2000), freeze_beyond=1e3)
        assert (abs(path[-1] - 5 ** (1 / 3)) < 0.01) == arrives

    def test_flat_slopes_converge_too(self):
        rng = np.random.default_rng(3)
        w = robbins_monro(
            lambda w, k: np.tanh(w - 1) + rng.normal(size=500), np.zeros(500), power_steps(1, 4000, scale=2)
        )
        assert w[-1].mean() == pytest.approx(1, abs=4 * w[-1].std() / np.sqrt(500) + 0.01)
        assert w[-1].std() < 0.05

    def test_a_frozen_run_stays_and_the_others_go_on(self):
        path = robbins_monro(lambda w, k: np.where(w > 1, np.nan, 1.0), [5.0, 0.0], [1.0, 1.0], freeze_beyond=2)
        assert path.tolist() == [[5, 0], [5, -1], [5, -2]]

    @pytest.mark.parametrize("steps", [[0.1, -0.1], [0.0], [np.nan], [np.inf]])
    def test_bad_steps(self, steps):
        with pytest.raises(ValueError, match=rf"steps must be positive and finite, but step {len(steps)} is"):
            robbins_monro(lambda w, k: w, 0.0, steps)

    def test_steps_of_another_shape(self):
        with pytest.raises(ValueError, match=r"steps must have shape \(n,\), one number per step, got shape \(1, 2\)"):
            robbins_monro(lambda w, k: w, 0.0, [[0.1, 0.2]])

    def test_an_observation_of_another_shape(self):
        with pytest.raises(ValueError, match=r"measure returned shape \(3,\) at step 2, expected \(2,\)"):
            robbins_monro(lambda w, k: np.zeros(1 + k), np.zeros(2), [1.0, 1.0])

    def test_an_observation_that_is_not_finite(self):
        with pytest.raises(ValueError, match=r"the observation at step 2 must be finite, got nan at index 1"):
            robbins_monro(lambda w, k: np.array([0.0, np.nan if k == 2 else 0.0]), np.zeros(2), [1.0, 1.0])

    def test_a_start_that_is_not_finite(self):
        with pytest.raises(ValueError, match="start must be finite, got inf"):
            robbins_monro(lambda w, k: w, np.inf, [1.0])


class TestPolyakRuppert:
    @given(streams)
    def test_is_the_mean_of_the_path_so_far(self, path):
        expected = [path[: k + 1].mean(axis=0) for k in range(len(path))]
        np.testing.assert_allclose(
            polyak_ruppert(path), expected, rtol=0, atol=1e-13 * max(1, np.abs(path).max()) * len(path)
        )

    @pytest.mark.parametrize("slope, at_ten_thousand", [(1.0, 1.0345), (5.0, 0.0403)])
    def test_variance_is_near_the_optimum(self, slope, at_ten_thousand):
        """Monte Carlo against the exact variance, from how much each noise term enters the average."""
        count, runs = 10_000, 1000
        steps = power_steps(0.7, count)
        weight, exact = 0.0, 0.0
        for a in steps[::-1]:  # w̄ = -Σ_j η_j a_j (1 + (1 - a_{j+1} h) + …)/n, summed from the last term back
            exact += (a * weight / count) ** 2
            weight = 1 + (1 - a * slope) * weight
        assert count * exact == pytest.approx(at_ten_thousand, abs=1e-4)
        rng = np.random.default_rng(4)
        path = robbins_monro(lambda w, k: slope * w + rng.normal(size=runs), np.zeros(runs), steps)[:-1]
        assert polyak_ruppert(path)[-1].var() == pytest.approx(exact, rel=4 * np.sqrt(2 / runs))

    @pytest.mark.parametrize("bad", [3.0, []])
    def test_bad_paths(self, bad):
        with pytest.raises(ValueError, match="path must hold at least one iterate"):
            polyak_ruppert(bad)


class TestLinearMse:
    def test_equals_listing_all_noise_of_two_values(self):
        steps, slope = np.array([0.7, 0.4, 0.9, 0.2]), 1.3
        ends = []
        for noise in itertools.product([-2.0, 2.0], repeat=4):  # variance 4, all 16 paths equally likely
            ends.append(robbins_monro(lambda w, k, noise=noise: slope * w + noise[k - 1], 3.0, steps))
        exact = (np.array(ends) ** 2).mean(axis=0)
        np.testing.assert_allclose(linear_mse(steps, slope=slope, noise_variance=4, start=9), exact, rtol=1e-12)

    def test_constant_step(self):
        assert linear_mse(np.full(2000, 0.1))[-1] == pytest.approx(0.1 / 1.9, abs=1e-12)  # 0.052632
        assert linear_mse(np.full(2000, 0.1), slope=3.0, noise_variance=2.0)[-1] == pytest.approx(0.2 / (3 * 1.7))

    @pytest.mark.parametrize("gain, limit", [(1, 1.0), (2, 4 / 3), (4, 16 / 7)])
    def test_gain_over_k(self, gain, limit):
        assert 10**6 * linear_mse(power_steps(1, 10**6, scale=gain))[-1] == pytest.approx(limit, abs=5e-6)

    def test_below_the_cliff_the_rate_is_slower(self):
        at = [10**4, 10**6]
        for gain, ratio in ((0.25, 10 ** (-2 * 2 * 0.25)), (0.5, 10**-2 * 6 / 4)):  # k^{-2a}; log k / k
            v = linear_mse(power_steps(1, 10**6, scale=gain))
            assert v[at[1]] / v[at[0]] == pytest.approx(ratio, rel=0.05)

    @pytest.mark.parametrize("bad", [{"noise_variance": -1.0}, {"start": -0.1}])
    def test_bad_variances(self, bad):
        with pytest.raises(ValueError, match="a variance is not negative"):
            linear_mse([0.1], **bad)


class TestStochasticGradientDescent:
    rows = np.random.default_rng(5).normal(size=(30, 3))
    target = np.random.default_rng(6).normal(size=30)

    def gradient(self, w, batch):
        return self.rows[batch].T @ (self.rows[batch] @ w - self.target[batch]) / len(batch)

    def test_full_batches_are_gradient_descent_and_reach_least_squares(self):
        path = stochastic_gradient_descent(
            self.gradient, np.zeros(3), np.full(500, 0.5), sample_count=30, batch_size=30, rng=np.random.default_rng(7)
        )
        w = np.zeros(3)
        for _ in range(3):
            w = w - 0.5 * self.rows.T @ (self.rows @ w - self.target) / 30
        np.testing.assert_allclose(path[3], w, rtol=1e-12)
        np.testing.assert_allclose(path[-1], np.linalg.lstsq(self.rows, self.target)[0], rtol=1e-9)

    @pytest.mark.parametrize("batch_size", [1, 3, 30])
    def test_a_batch_holds_different_samples_and_each_is_as_likely(self, batch_size):
        seen = []

        def gradient(w, batch):
            assert len(set(batch)) == batch_size
            seen.extend(batch)
            return np.zeros(())

        steps = np.ones(6000 // batch_size)
        stochastic_gradient_descent(
            gradient, 0.0, steps, sample_count=30, batch_size=batch_size, rng=np.random.default_rng(8)
        )
        counts = np.bincount(seen, minlength=30)
        assert np.abs(counts - 200).max() <= 5 * np.sqrt(200)

    @pytest.mark.parametrize("batch_size", [0, 31])
    def test_bad_batch_size(self, batch_size):
        with pytest.raises(ValueError, match=rf"batch_size must lie between 1 and sample_count=30, got {batch_size}"):
            stochastic_gradient_descent(
                self.gradient, np.zeros(3), [0.1], sample_count=30, batch_size=batch_size, rng=np.random.default_rng(0)
            )


def test_one_over_log_does_not_settle_and_one_over_root_does():
    """1/log(k+2) converges in mean square, but the largest error of each doubling block stays near 1."""
    count = 2**14
    rng = np.random.default_rng(9)
    noise = rng.normal(size=(count, 50))

    def largest(steps):
        w = robbins_monro(lambda w, k: w - noise[k - 1], np.zeros(50), steps)
        return np.abs(w[count // 2 :]).max(axis=0).mean()

    k = np.arange(1, count + 1)
    assert 0.8 < largest(1 / np.log(k + 2)) < 1.2
    assert largest(1 / np.sqrt(k)) < 0.3
    assert linear_mse(1 / np.log(k + 2))[-1] == pytest.approx(1 / (2 * np.log(count)), rel=0.1)


def test_the_nile_data():
    years, flow = load_nile()
    assert years.tolist() == list(range(1871, 1971))
    assert (flow.min(), flow.max(), flow[0]) == (456, 1370, 1120)

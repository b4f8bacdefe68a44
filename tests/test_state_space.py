"""State space layers against dense algebra, scipy, direct sums, and each way of computing against the others."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from helpers.hippo import discretise, transition
from helpers.state_space import (
    causal_convolution,
    kernel_by_powers,
    normal_plus_low_rank,
    recur,
    run_recurrence,
    s4_kernel,
    scan,
    selective_ssm,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class TestS4:
    @pytest.mark.parametrize("n", [1, 2, 8, 64, 128])
    def test_a_is_normal_plus_rank_one(self, n):
        a, _ = transition("legs", n)
        lam, p, v = normal_plus_low_rank(n)
        assert np.all(lam.real == -0.5)
        np.testing.assert_allclose(v.conj().T @ v, np.eye(n), atol=1e-13)
        np.testing.assert_allclose((v * lam) @ v.conj().T - np.outer(p, p), a, atol=1e-12)
        normal_part = a + np.outer(p, p)
        np.testing.assert_allclose(normal_part @ normal_part.T, normal_part.T @ normal_part, atol=1e-10 * n)

    @pytest.mark.parametrize("n", [1, 2, 8, 64, 128])
    @pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 1000])
    @pytest.mark.parametrize("dt", [1e-3, 1 / 64, 0.5])
    def test_the_cauchy_kernel_equals_the_powers(self, n, length, dt):
        c = normal(n)
        a, b = discretise(*transition("legs", n), dt, "bilinear")
        powers = kernel_by_powers(a, b, c, length)
        np.testing.assert_allclose(s4_kernel(c, dt, length), powers, rtol=0, atol=1e-10 * max(1, np.abs(powers).max()))

    def test_powers_equal_scipys_impulse_response(self):
        n, c = 6, normal(6)
        a, b = discretise(*transition("legs", n), 0.1)
        _, (response,) = scipy.signal.dimpulse((a, b[:, None], c[None], np.zeros((1, 1)), 1.0), n=51)
        np.testing.assert_allclose(kernel_by_powers(a, b, c, 50), response[1:, 0], atol=1e-13)

    @given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 99))
    def test_convolution_equals_recurrence(self, length, n, seed):
        c, u = normal(n, seed=seed), normal(length, seed=seed + 1)
        a, b = discretise(*transition("legs", n), 0.05, "bilinear")
        by_steps = run_recurrence(a, b, c, u)
        by_fft = causal_convolution(s4_kernel(c, 0.05, length), u)
        np.testing.assert_allclose(by_fft, by_steps, rtol=0, atol=1e-10)
        np.testing.assert_allclose(by_steps, np.convolve(kernel_by_powers(a, b, c, length), u)[:length], atol=1e-11)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"shape \(n,\), got \(2, 2\)"):
            s4_kernel(np.ones((2, 2)), 0.1, 8)
        with pytest.raises(ValueError, match=r"got \(0,\)"):
            s4_kernel([], 0.1, 8)
        with pytest.raises(ValueError, match="dt must be positive"):
            s4_kernel(np.ones(2), 0, 8)
        for length in (0, 2.5):
            with pytest.raises(ValueError, match="integer of at least 1"):
                s4_kernel(np.ones(2), 0.1, length)
            with pytest.raises(ValueError, match="integer of at least 1"):
                kernel_by_powers(np.eye(2), np.ones(2), np.ones(2), length)
        with pytest.raises(ValueError, match=r"got \(3,\) and \(4,\)"):
            causal_convolution(np.ones(3), np.ones(4))
        with pytest.raises(ValueError, match="not empty"):
            causal_convolution([], [])
        with pytest.raises(ValueError, match=r"u must have shape \(length,\), got \(3, 2\)"):
            run_recurrence(np.eye(2), np.ones(2), np.ones(2), np.ones((3, 2)))
        for a, b, c in ((np.eye(3), np.ones(2), np.ones(2)), (np.eye(2), np.ones(2), np.ones(3)), (1.0, 1.0, 1.0)):
            with pytest.raises(ValueError, match=r"shapes \(n, n\), \(n,\) and \(n,\)"):
                run_recurrence(a, b, c, np.ones(4))
            with pytest.raises(ValueError, match=r"shapes \(n, n\), \(n,\) and \(n,\)"):
                kernel_by_powers(a, b, c, 4)

    def test_an_imaginary_part_is_not_dropped(self):
        with pytest.raises(TypeError, match="real numbers, got complex128"):
            s4_kernel([1j, 1.0], 0.1, 8)
        with pytest.raises(TypeError, match="real numbers"):
            kernel_by_powers(np.eye(2), np.ones(2), np.ones(2) * 1j, 3)
        with pytest.raises(TypeError, match="real numbers"):
            run_recurrence(np.eye(2) * 1j, np.ones(2), np.ones(2), np.ones(3))
        with pytest.raises(TypeError, match="real numbers"):
            selective_ssm([1.0], [1.0], [-1 + 2j], [[1.0]], [[1.0]])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_one_gap_does_not_spread_over_all_outputs(self, bad):
        """By FFT, a NaN in the last sample reaches the first output."""
        eye, one, gap = np.eye(2), np.ones(2), np.array([1.0, bad])
        for call in (
            lambda: causal_convolution(one, gap),
            lambda: causal_convolution(gap, one),
            lambda: s4_kernel(gap, 0.1, 8),
            lambda: kernel_by_powers(eye, gap, one, 3),
            lambda: run_recurrence(eye, one, one, gap),
        ):
            with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity"):
                call()


class TestScan:
    @given(st.integers(1, 70), st.sampled_from([(), (3,), (2, 3)]), st.booleans(), st.integers(0, 99))
    def test_equals_the_loop(self, length, shape, is_complex, seed):
        a, b = normal(length, *shape, seed=seed), normal(length, *shape, seed=seed + 1)
        if is_complex:
            a, b = a * np.exp(1j * b), b * np.exp(2j * a)
        a = a / np.abs(a).max()
        np.testing.assert_allclose(scan(a, b), recur(a, b), rtol=1e-12, atol=1e-12)

    @given(st.integers(1, 20), st.integers(0, 99))
    def test_the_loop_is_the_sum_of_products(self, length, seed):
        a, b = normal(length, seed=seed), normal(length, seed=seed + 1)
        direct = [sum(np.prod(a[j + 1 : k + 1]) * b[j] for j in range(k + 1)) for k in range(length)]
        np.testing.assert_allclose(recur(a, b), direct, rtol=1e-9, atol=1e-11)

    def test_a_number_a_step_goes_with_a_matrix_a_step(self):
        a, b = normal(9), normal(9, 2, 3)
        for way in (scan, recur):
            assert way(a, b).shape == (9, 2, 3)
            np.testing.assert_allclose(way(a, b)[:, 1, 2], way(a, b[:, 1, 2]), atol=1e-12)

    def test_zeros_forget_and_huge_lengths_do_not_overflow(self):
        a = np.ones(1000)
        a[500] = 0
        np.testing.assert_allclose(scan(a, np.ones(1000))[-1], 500)
        assert np.isfinite(scan(np.full(100_000, 0.5), np.ones(100_000))).all()

    def test_it_takes_lists_and_leaves_its_arguments_alone(self):
        a, b = np.ones(4), np.ones(4)
        scan(a, b)
        assert np.array_equal(a, np.ones(4)) and np.array_equal(b, np.ones(4))
        np.testing.assert_array_equal(scan([2, 2, 2], [1, 1, 1]), [1, 3, 7])

    @pytest.mark.parametrize("a, b", [(np.ones(3), np.ones(4)), ([], []), (1.0, np.ones(2)), (np.ones(1), np.ones(4))])
    def test_bad_input(self, a, b):
        for way in (scan, recur):
            with pytest.raises(ValueError, match="one length of at least 1"):
                way(a, b)


class TestSelective:
    def inputs(self, length=40, n=3):
        delta = np.abs(normal(length))
        return (
            normal(length, seed=1),
            delta,
            -np.arange(1.0, n + 1),
            normal(length, n, seed=2),
            normal(length, n, seed=3),
        )

    @pytest.mark.parametrize("exact", [False, True])
    def test_equals_dense_steps(self, exact):
        u, delta, a, b, c = self.inputs()
        x, expected = np.zeros(3), []
        for k in range(40):
            bar = scipy.linalg.expm(delta[k] * np.diag(a))
            gain = np.linalg.solve(np.diag(a), bar - np.eye(3)) @ b[k] if exact else delta[k] * b[k]
            x = bar @ x + gain * u[k]
            expected.append(c[k] @ x)
        np.testing.assert_allclose(selective_ssm(u, delta, a, b, c, exact_input=exact), expected, atol=1e-12)

    def test_with_one_state_it_is_a_gate(self):
        """Mamba's theorem 1: delta = softplus(z), a = -1, b = 1 gives x = (1 - g) x + g u with g = sigmoid(z)."""
        u, z = normal(50), normal(50, seed=7)
        ones = np.ones((50, 1))
        layer = selective_ssm(u, np.log1p(np.exp(z)), [-1.0], ones, ones, exact_input=True)
        gate, x, expected = 1 / (1 + np.exp(-z)), 0.0, []
        for g, value in zip(gate, u, strict=True):
            expected.append(x := (1 - g) * x + g * value)
        np.testing.assert_allclose(layer, expected, atol=1e-13)

    def test_a_step_of_zero_keeps_everything(self):
        u, delta, a, b, c = self.inputs()
        delta[10:] = 0
        c[:] = 1.0
        outputs = selective_ssm(u, delta, a, b, c)
        np.testing.assert_array_equal(outputs[10:], outputs[9])

    def test_bad_input(self):
        u, delta, a, b, c = self.inputs()
        with pytest.raises(ValueError, match="a must be negative"):
            selective_ssm(u, delta, -a, b, c)
        with pytest.raises(ValueError, match="delta must not be"):
            selective_ssm(u, -delta, a, b, c)
        for bad in (np.inf, np.nan):
            with pytest.raises(ValueError, match="expected finite numbers"):
                selective_ssm(u, np.full_like(delta, bad), a, b, c)
        with pytest.raises(ValueError, match=r"b and c shape \(length, n\)"):
            selective_ssm(u, delta, a, b[:, :2], c)
        with pytest.raises(ValueError, match=r"b and c shape \(length, n\)"):
            selective_ssm(u, delta, a, b, c[:, :1])

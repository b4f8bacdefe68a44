"""HiPPO against the official code's matrices, quadrature, exact rational integrals, scipy and the definition."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from helpers.hippo import (
    METHODS,
    discretise,
    laguerre,
    legendre,
    legs_product,
    legs_solve,
    legs_step,
    project,
    project_stream,
    reconstruct,
    stretch,
    transition,
)

OFFICIAL = json.loads((Path(__file__).parent / "data" / "hippo" / "hippo_code_transition.json").read_text("utf-8"))
SCIPY = {"euler": "euler", "backward": "backward_diff", "bilinear": "bilinear", "exact": "zoh"}
SIZES = (1, 2, 3, 8, 32, 64)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def wave(length):
    return np.sin(np.arange(length) / 17) + normal(length).cumsum() / 20


class TestPolynomials:
    @pytest.mark.parametrize("n", SIZES)
    def test_legendre_is_mpmaths(self, n):
        for s in (0.0, 0.3, 0.77, 1.0):
            theirs = [float(mpmath.legendre(k, 2 * mpmath.mpf(s) - 1) * mpmath.sqrt(2 * k + 1)) for k in range(n)]
            np.testing.assert_allclose(legendre(n, s), theirs, atol=1e-12)

    @pytest.mark.parametrize("n", SIZES)
    def test_laguerre_is_mpmaths(self, n):
        for age in (0.0, 0.5, 7.0, 300.0):
            theirs = [float(mpmath.laguerre(k, 0, age) * mpmath.exp(-age / 2)) for k in range(n)]
            np.testing.assert_allclose(laguerre(n, age), theirs, atol=1e-12)

    def test_far_in_the_past_laguerre_is_zero_and_not_nan(self):
        assert np.array_equal(laguerre(64, [1e4, 1e8]), np.zeros((2, 64)))
        assert not laguerre(4, [1e160, 1e308]).any()

    @pytest.mark.parametrize("n, age", [(400, 1495.0), (1000, 2000.0), (1000, 1e-9), (1000, 3900.0)])
    def test_many_laguerre_functions_are_not_lost_where_the_exponential_underflows(self, n, age):
        """e^(-1000) is zero in float64, and the polynomial beside it overflows."""
        with mpmath.workdps(60):
            theirs = float(mpmath.laguerre(n - 1, 0, age) * mpmath.exp(-mpmath.mpf(age) / 2))
        assert abs(theirs) > 1e-3
        assert laguerre(n, [3.0, age])[1, -1] == pytest.approx(theirs, rel=1e-9)

    def test_shapes(self):
        assert legendre(3, 0.5).shape == laguerre(3, 0.5).shape == (3,)
        assert legendre(3, np.zeros((2, 4))).shape == laguerre(3, np.zeros((2, 4))).shape == (2, 4, 3)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            legendre(0, 0.5)
        with pytest.raises(ValueError, match=r"integer of at least 1, got 2\.5"):
            legendre(2.5, 0.5)
        with pytest.raises(ValueError, match="age must not be negative"):
            laguerre(2, [-1.0])


class TestProject:
    @pytest.mark.parametrize("n, length", [(1, 1), (4, 1), (5, 7), (32, 40), (64, 300)])
    def test_equals_gauss_on_each_piece(self, n, length):
        """n nodes on each piece are exact for what is integrated."""
        z, w = np.polynomial.legendre.leggauss(max(n, 2))
        s = (np.arange(length)[:, None] + (z + 1) / 2) / length
        u = normal(length)
        expected = np.einsum("k,kjn,j->n", u, legendre(n, s), w / 2 / length)
        np.testing.assert_allclose(project(u, n), expected, atol=1e-13)

    def test_nothing_is_nearer(self):
        u, n = wave(50), 6
        s = (np.arange(50_000) + 0.5) / 50_000
        past = u[(s * 50).astype(int)]
        error = ((past - reconstruct(project(u, n), s)) ** 2).mean()
        for seed in range(5):
            change = normal(n, seed=seed) / 50
            worse = ((past - reconstruct(project(u, n) + change, s)) ** 2).mean()
            assert worse - error == pytest.approx((change**2).sum(), rel=1e-3)

    def test_batches(self):
        u = normal(2, 3, 20)
        assert project(u, 4).shape == (2, 3, 4)
        np.testing.assert_allclose(project(u, 4)[1, 2], project(u[1, 2], 4), atol=1e-15)
        assert reconstruct(project(u, 4), 1.0).shape == (2, 3)
        with pytest.raises(ValueError, match=r"s must be a number .* got \(2, 4\)"):
            reconstruct(project(u, 4), np.ones((2, 4)))  # as many columns as coefficients: the wrong axis would fit
        assert reconstruct(project(u, 4), np.linspace(0, 1, 7)).shape == (2, 3, 7)

    @pytest.mark.parametrize("bad", [np.array([]), [1.0, np.nan], [np.inf]])
    def test_bad_signals(self, bad):
        with pytest.raises(ValueError, match=r"empty|NaN or infinity"):
            project(bad, 3)
        with pytest.raises(ValueError, match=r"empty|NaN or infinity"):
            project_stream(bad, 3)

    def test_not_numbers(self):
        with pytest.raises(TypeError, match="real numbers"):
            project(["a"], 3)


class TestTransition:
    @pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.startswith("lmu")])
    def test_equals_the_official_code(self, name):
        measure, n = name.split("_")
        for ours, theirs in zip(transition(measure, int(n)), ("A", "B"), strict=True):
            np.testing.assert_allclose(ours, np.reshape(OFFICIAL[name][theirs], ours.shape), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [4, 8])
    def test_legendre_memory_units_are_legt_in_other_units(self, n):
        """Their coefficients are (-1)^n sqrt(2n + 1) times ours."""
        a, b = transition("legt", n)
        factor = (-1.0) ** np.arange(n) * np.sqrt(2 * np.arange(n) + 1)
        np.testing.assert_allclose(factor[:, None] * a / factor, OFFICIAL[f"lmu_{n}"]["A"], atol=1e-12)
        np.testing.assert_allclose(factor * b, np.ravel(OFFICIAL[f"lmu_{n}"]["B"]), atol=1e-12)

    @pytest.mark.parametrize("n", SIZES)
    def test_legs_from_its_defining_integrals(self, n):
        """A_nk = -δ_nk - ∫ s g_n'(s) g_k(s) ds over [0, 1], by Gauss's rule with derivatives from numpy."""
        z, w = np.polynomial.legendre.leggauss(n + 1)
        root = np.sqrt(2 * np.arange(n) + 1)
        basis = np.polynomial.legendre.legvander(z, n - 1) * root
        slopes = self.slopes(n, z) * root
        a, b = transition("legs", n)
        np.testing.assert_allclose(a, -np.eye(n) - slopes.T * ((z + 1) * w / 2) @ basis, rtol=0, atol=1e-12 * n)
        np.testing.assert_allclose(b, legendre(n, 1.0), atol=1e-12)

    @pytest.mark.parametrize("n", SIZES)
    def test_legt_from_its_defining_integrals(self, n):
        z, w = np.polynomial.legendre.leggauss(n + 1)
        root = np.sqrt(2 * np.arange(n) + 1)
        basis = np.polynomial.legendre.legvander(z, n - 1) * root
        lost = np.outer(legendre(n, 0.0), legendre(n, 0.0))  # what leaves the window, as the coefficients see it
        a, b = transition("legt", n)
        np.testing.assert_allclose(a, -(self.slopes(n, z) * root).T * w @ basis - lost, rtol=0, atol=1e-12 * n)
        np.testing.assert_allclose(b, legendre(n, 1.0), atol=1e-12)

    @pytest.mark.parametrize("n", SIZES)
    def test_lagt_from_its_defining_integrals(self, n):
        """A_nk = ∫ l_n' l_k over the ages, where l_n = L_n e^(-age/2)."""
        age, w = np.polynomial.laguerre.laggauss(n + 1)
        values = np.polynomial.laguerre.lagvander(age, n - 1)
        slopes = np.stack([np.polynomial.laguerre.lagval(age, np.polynomial.laguerre.lagder(e)) for e in np.eye(n)])
        a, b = transition("lagt", n)
        np.testing.assert_allclose((slopes - values.T / 2) * w @ values, a, rtol=0, atol=1e-11 * n)
        np.testing.assert_array_equal(b, laguerre(n, 0.0))

    @pytest.mark.parametrize("n", [2, 5, 9])
    def test_legs_in_exact_fractions(self, n):
        """Monomials integrate to fractions, so the square of each entry is one, too."""
        powers = [self.shifted(k) for k in range(n)]
        a, _ = transition("legs", n)
        for i in range(n):
            for j in range(n):
                slope = [k * x for k, x in enumerate(powers[i])]  # coefficients of s P_i'
                integral = sum(x * y / (p + q + 1) for p, x in enumerate(slope) for q, y in enumerate(powers[j]))
                entry = -float(integral) * ((2 * i + 1) * (2 * j + 1)) ** 0.5 - (i == j)
                assert a[i, j] == pytest.approx(entry, abs=1e-13)

    @staticmethod
    def slopes(n, z):
        return np.stack([np.polynomial.legendre.legval(z, np.polynomial.legendre.legder(e)) for e in np.eye(n)], -1)

    @staticmethod
    def shifted(n):
        """Coefficients in s of the Legendre polynomial of 2s - 1."""
        binomial = scipy.special.comb
        signs = [(-1) ** (n + k) for k in range(n + 1)]
        return [Fraction(s * binomial(n, k, exact=True) * binomial(n + k, k, exact=True)) for k, s in enumerate(signs)]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="one of legs, legt, lagt, got 'fourier'"):
            transition("fourier", 3)
        with pytest.raises(ValueError, match="got -1"):
            transition("legs", -1)


class TestDiscretise:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("dt", [1e-4, 0.02, 0.7])
    def test_equals_scipy(self, measure, n, method, dt):
        a, b = transition(measure, n)
        expected = scipy.signal.cont2discrete((a, b[:, None], np.eye(n), np.zeros((n, 1))), dt, SCIPY[method])
        ours = discretise(a, b, dt, method)
        scale = max(1, np.abs(expected[0]).max())
        np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=1e-11 * scale)
        np.testing.assert_allclose(ours[1], expected[1][:, 0], rtol=0, atol=1e-11 * scale)

    @given(st.integers(1, 12), st.floats(1e-3, 2.0), st.integers(0, 100))
    def test_two_exact_steps_are_one_of_twice_the_length(self, n, dt, seed):
        a, b = transition("legs", n)
        x = normal(n, seed=seed)
        once, twice = discretise(a, b, 2 * dt), discretise(a, b, dt)
        again = twice[0] @ (twice[0] @ x + twice[1]) + twice[1]
        np.testing.assert_allclose(once[0] @ x + once[1], again, atol=1e-11)

    def test_bad_input(self):
        a, b = transition("legs", 3)
        for dt in (0, -1.0, np.inf, np.nan):
            with pytest.raises(ValueError, match="dt must be positive"):
                discretise(a, b, dt)
        with pytest.raises(ValueError, match=r"one of euler, .*got 'zoh'"):
            discretise(a, b, 0.1, "zoh")
        with pytest.raises(TypeError, match="a must hold real numbers"):
            discretise(1j * a, b, 0.1)
        for method in METHODS:
            with pytest.raises(ValueError, match="b holds NaN"):
                discretise(a, b * np.nan, 0.1, method)
        with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3,\)"):
            discretise(a[:, :2], b, 0.1)


class TestLegsStep:
    @pytest.mark.parametrize("n", [*SIZES, 128, 1000])
    def test_product_and_solve_equal_the_dense_ones(self, n):
        a, _ = transition("legs", n)
        c = normal(n)
        size = np.abs(a @ c).max()
        np.testing.assert_allclose(legs_product(c), a @ c, rtol=0, atol=1e-12 * size)
        for h in (0.0, 1e-3, 0.5, 3.0):
            dense = scipy.linalg.solve_triangular(np.eye(n) - h * a, c, lower=True)
            np.testing.assert_allclose(legs_solve(c, h), dense, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("n", [2, 32, 64, 256])
    @pytest.mark.parametrize("k", [1, 7, 5000])
    def test_each_step_equals_the_dense_one(self, n, k):
        a, b = transition("legs", n)
        c, u, one = project(wave(60), n), 0.7, np.eye(n)
        dense = {
            "euler": c + (a @ c + b * u) / k,
            "backward": np.linalg.solve(one - a / (k + 1), c + b * u / (k + 1)),
            "bilinear": np.linalg.solve(one - a / (2 * k + 2), c + (a @ c + b * u) / (2 * k) + b * u / (2 * k + 2)),
            "exact": scipy.linalg.expm(a * np.log1p(1 / k)) @ c
            + np.linalg.solve(a, (scipy.linalg.expm(a * np.log1p(1 / k)) - one) @ b) * u,
        }
        for method, expected in dense.items():
            scale = max(1, np.abs(expected).max())
            np.testing.assert_allclose(legs_step(c, u, k, method), expected, rtol=0, atol=1e-10 * scale)

    @pytest.mark.parametrize("kind, k", [(np.int8, 127), (np.uint8, 255), (np.int32, 2**31 - 1)])
    def test_small_integers_count_like_pythons(self, kind, k):
        for method in METHODS:
            np.testing.assert_array_equal(
                legs_step([1, 2, 3.0], 2.0, kind(k), method), legs_step([1, 2, 3.0], 2.0, k, method)
            )

    def test_numbers_too_large_for_the_result_are_named(self):
        with pytest.raises(ValueError, match="u holds NaN or infinity"):
            legs_step(np.ones(3, np.float32), 1e39, 3)
        with pytest.raises(ValueError, match=r"h \(n \+ 1\) finite in float64, got 1e\+308"):
            legs_solve(np.ones(4), 1e308)
        with pytest.raises(ValueError, match="finite in float32"):
            legs_solve(np.ones(4, np.float32), 1e38)
        a, _ = transition("legs", 4)
        for dtype, h in ((np.float64, 1e307), (np.float32, 5e37)):  # just below: x is y / -h A, rounded
            expected = np.linalg.solve(-a, np.ones(4))
            np.testing.assert_allclose(legs_solve(np.ones(4, dtype), h) * h, expected, atol=1e-6)

    @given(st.integers(1, 40), st.integers(1, 4), st.sampled_from(METHODS), st.integers(0, 99))
    def test_a_batch_is_its_rows(self, n, batch, method, seed):
        c, u = normal(batch, n, seed=seed), normal(batch, seed=seed + 1)
        rows = [legs_step(x, y, 3, method) for x, y in zip(c, u, strict=True)]
        np.testing.assert_allclose(legs_step(c, u, 3, method), rows, rtol=1e-12, atol=1e-11)

    @given(st.integers(1, 30), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
    def test_stretching_twice_is_stretching_once(self, n, first, second):
        c = normal(n)
        np.testing.assert_allclose(stretch(stretch(c, first), second), stretch(c, first * second), atol=1e-10)

    @pytest.mark.parametrize("n", [1, 16, 64, 256])
    def test_stretch_is_the_matrix_exponential(self, n):
        a, _ = transition("legs", n)
        for ratio in (0.5, 0.9, 0.999, 1.0):
            expected = scipy.linalg.expm(a * np.log(1 / ratio))
            np.testing.assert_allclose(stretch(np.eye(n), ratio).T, expected, atol=1e-11)

    def test_dtypes(self):
        for dtype, expected in ((np.float16, np.float32), (np.float32, np.float32), (int, float)):
            for method in METHODS:
                assert legs_step(np.ones(4, dtype), 1, 3, method).dtype == expected
            for way in (legs_product, lambda c: legs_solve(c, 0.5), lambda c: stretch(c, 0.5)):
                assert way(np.ones(4, dtype)).dtype == expected

    def test_float32_is_stretched_in_float64(self):
        c = normal(3, 64).astype(np.float32)
        np.testing.assert_array_equal(stretch(c, 0.3), stretch(c.astype(float), 0.3).astype(np.float32))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_a_gap_is_named(self, bad, dtype):
        """One NaN in c would spread to every number of the result; the argument that holds it is named."""
        c, gap = np.ones(3, dtype), np.array([1, bad, 2], dtype)
        for name, call in (
            ("c", lambda: stretch(gap, 0.5)),
            ("c", lambda: legs_product(gap)),
            ("y", lambda: legs_solve(gap, 0.5)),
            ("c", lambda: legs_step([c, gap], [1.0, 1.0], 3)),
            ("u", lambda: legs_step([c, c, c], gap, 3)),
            ("c", lambda: reconstruct(gap, [0.5])),
            ("s", lambda: reconstruct(c, gap)),
            ("s", lambda: legendre(3, gap)),
            ("age", lambda: laguerre(3, gap)),
        ):
            with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
                call()

    @pytest.mark.parametrize("method", METHODS)
    def test_a_sample_for_each_row(self, method):
        for c, u in ((np.ones(3), np.ones(2)), (np.ones((2, 3)), 1.0), (np.ones((2, 3)), np.ones(3))):
            with pytest.raises(ValueError, match="one sample for each row"):
                legs_step(c, u, 3, method)
        with pytest.raises(TypeError, match="u must hold real numbers"):
            legs_step(np.ones(3), 1j, 3, method)

    @pytest.mark.parametrize("method", ["backward", "bilinear", "exact"])
    def test_float32_loses_its_own_digits_and_no_more(self, method):
        u = wave(400)
        single, double = (project_stream(u.astype(t), 64, method=method)[-1] for t in (np.float32, np.float64))
        assert single.dtype == np.float32
        assert np.abs(single - double).max() < 1e-4 * np.abs(double).max()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="k must be at least 1"):
            legs_step(np.ones(3), 1.0, 0)
        with pytest.raises(ValueError, match=r"an integer: .*got 2\.5"):
            legs_step(np.ones(3), 1.0, 2.5)
        for bad in (3.0, []):
            with pytest.raises(ValueError, match="last axis that is not empty"):
                stretch(bad, 0.5)
        with pytest.raises(TypeError, match="real numbers"):
            stretch([1j, 2], 0.5)
        with pytest.raises(ValueError, match="h must be finite and not negative"):
            legs_solve(np.ones(3), -0.1)
        for ratio in (0, 1.5, np.nan):
            with pytest.raises(ValueError, match="ratio must lie"):
                stretch(np.ones(3), ratio)
        with pytest.raises(ValueError, match="last axis that is not empty"):
            legs_product([])
        with pytest.raises(TypeError, match="real numbers"):
            legs_product(np.ones(3, complex))


class TestStream:
    @pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 128])
    def test_the_exact_steps_are_the_projection(self, n):
        u = wave(300)
        states = project_stream(u, n)
        for k in (1, 2, 10, 300):
            np.testing.assert_allclose(states[k - 1], project(u[:k], n), atol=2e-13)

    def test_a_thousand_exact_steps(self):
        u = wave(1000)
        expected = project(u, 32)
        assert np.linalg.norm(project_stream(u, 32)[-1] - expected) < 1e-12 * np.linalg.norm(expected)

    @pytest.mark.parametrize("method, order", [("euler", 1), ("backward", 1), ("bilinear", 2)])
    def test_the_other_steps_converge_with_their_order(self, method, order):
        u, n = wave(100), 16
        expected = project(u, n)
        errors = [np.abs(project_stream(np.repeat(u, r), n, method=method)[-1] - expected).max() for r in (8, 16)]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.06)

    def test_only_the_exact_step_does_not_see_the_sampling_rate(self):
        u = wave(200)
        slow, fast = project_stream(u, 24)[-1], project_stream(np.repeat(u, 5), 24)[-1]
        np.testing.assert_allclose(slow, fast, atol=1e-13)
        slow, fast = (project_stream(v, 24, method="bilinear")[-1] for v in (u, np.repeat(u, 5)))
        assert np.linalg.norm(slow - fast) > 1e-4 * np.linalg.norm(slow)

    def test_euler_explodes(self):
        assert np.abs(project_stream(np.sin(np.arange(200) / 9), 64, method="euler")).max() > 1e40

    @pytest.mark.parametrize("measure", ["legt", "lagt"])
    @pytest.mark.parametrize("method", METHODS)
    def test_windows_that_slide_and_fade_equal_scipys_simulation(self, measure, method):
        n, theta, u = 6, 80.0, wave(150)
        a, b = transition(measure, n)
        system = (a / theta, b[:, None] / theta, np.eye(n), np.zeros((n, 1)))
        a, b, *_ = scipy.signal.cont2discrete(system, 1.0, SCIPY[method])
        x, expected = np.zeros(n), []
        for value in u:
            expected.append(x := a @ x + b[:, 0] * value)
        np.testing.assert_allclose(project_stream(u, n, measure, method, theta), expected, atol=1e-11)

    def test_lagt_keeps_the_integrals_that_define_it(self):
        n, theta, u = 12, 20.0, wave(90)
        state = project_stream(u, n, "lagt", theta=theta)[-1]
        z, w = np.polynomial.legendre.leggauss(20)
        ages = (np.arange(90)[::-1, None] + (1 - z) / 2) / theta  # of the points within each step
        expected = np.einsum("k,kjn,j->n", u, laguerre(n, ages), w / 2 / theta)
        np.testing.assert_allclose(state, expected, atol=1e-12)

    def test_legt_is_exact_for_what_it_can_draw(self):
        """A polynomial of low degree leaves the window exactly as the coefficients say."""
        n, theta = 8, 5.0
        a, b = transition("legt", n)
        c = np.zeros(n)
        c[0] = 1.0  # a constant past
        np.testing.assert_allclose(a @ c + b, 0, atol=1e-12)
        states = project_stream(np.ones(400), n, "legt", theta=theta)
        np.testing.assert_allclose(states[-1], c, atol=1e-10)

    def test_batches_and_dtypes(self):
        u = normal(2, 3, 12)
        for kind in ({}, {"measure": "legt", "theta": 6.0}, {"measure": "lagt", "theta": 3}):
            states = project_stream(u, 4, **kind)
            assert states.shape == (2, 3, 12, 4) and states.dtype == float
            np.testing.assert_allclose(states[1, 2], project_stream(u[1, 2], 4, **kind), atol=1e-13)
            assert project_stream(u.astype(np.float32), 4, **kind).dtype == np.float32
        np.testing.assert_array_equal(project_stream([3], 4), [[3, 0, 0, 0]])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="needed there; got theta=None for 'legt'"):
            project_stream([1.0], 3, "legt")
        with pytest.raises(ValueError, match="got theta=3 for 'legs'"):
            project_stream([1.0], 3, theta=3)
        with pytest.raises(ValueError, match="theta must be positive"):
            project_stream([1.0], 3, "lagt", theta=0)

"""SGD, SGDW, Adam and AdamW against torch.optim, closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.adamw import (
    adam_step,
    adamw_step,
    equilibrium_rms,
    largest_step,
    sgd_step,
    sgdw_step,
    trajectory,
    uncorrected_ratio,
)


def stored_gradients():
    """50 steps of 12 coordinates: scales 1e-6 … 1e4, sparse, zero, late, constant, alternating."""
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(50, 12)) * np.geomspace(1e-6, 1e4, 12)
    gradients[:, 1] *= rng.random(50) < 0.1
    gradients[:, 10] *= rng.random(50) < 0.1
    gradients[:, 4] = 0.0
    gradients[:30, 5] = 0.0
    gradients[:30, 11] = 0.0
    gradients[:, 6] = 0.25
    gradients[:, 7] = np.resize([1.0, -1.0], 50)
    return gradients


GRADIENTS = stored_gradients()
START = np.random.default_rng(3).normal(size=12)


def by_torch(optimizer, *, decoupled=0.0, dtype=torch.float64, **options):
    """The path of a torch optimiser over GRADIENTS; `decoupled` decays before each step, which torch's SGD cannot."""
    theta = torch.tensor(START, dtype=dtype, requires_grad=True)
    optimizer = optimizer([theta], **options)
    path = [theta.detach().numpy().copy()]
    for gradient in GRADIENTS:
        with torch.no_grad():
            theta *= 1 - options["lr"] * decoupled
        theta.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        path.append(theta.detach().numpy().copy())
    return np.array(path)


def ours(step, **options):
    return trajectory(step, lambda theta, k: GRADIENTS[k - 1], START, 50, **options)


ADAM_OPTIONS = [
    {"lr": 1e-3},
    {"lr": 0.1, "betas": (0.0, 0.9)},
    {"lr": 0.01, "betas": (0.95, 0.98), "eps": 1e-3},
    {"lr": 0.01, "weight_decay": 0.3},
    {"lr": 0.3, "weight_decay": 2.0, "eps": 1e-12},
    {"lr": 0.0, "weight_decay": 1.0},
]
SGD_OPTIONS = [
    {"lr": 1e-5},
    {"lr": 1e-5, "momentum": 0.9},
    {"lr": 1e-4, "weight_decay": 3.0},
    {"lr": 1e-3, "momentum": 0.99, "weight_decay": 10.0},
]


class TestAgainstTorch:
    @pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
    def test_adam(self, options):
        np.testing.assert_allclose(ours(adam_step, **options), by_torch(torch.optim.Adam, **options), rtol=1e-12)

    @pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
    def test_adamw_with_both_of_torchs_names(self, options):
        options = {"weight_decay": 0.01} | options
        path = ours(adamw_step, **options)
        np.testing.assert_allclose(path, by_torch(torch.optim.AdamW, **options), rtol=1e-12)
        flagged = by_torch(torch.optim.Adam, decoupled_weight_decay=True, **options)
        np.testing.assert_allclose(path, flagged, rtol=1e-12)

    @pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
    def test_sgd(self, options):
        np.testing.assert_allclose(ours(sgd_step, **options), by_torch(torch.optim.SGD, **options), rtol=1e-12)

    @pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
    def test_sgdw(self, options):
        plain = {name: value for name, value in options.items() if name != "weight_decay"}
        oracle = by_torch(torch.optim.SGD, decoupled=options.get("weight_decay", 0.0), **plain)
        np.testing.assert_allclose(ours(sgdw_step, **options), oracle, rtol=1e-12)

    def test_the_defaults_are_torchs(self):
        np.testing.assert_allclose(ours(adam_step), by_torch(torch.optim.Adam, lr=1e-3), rtol=1e-12)
        np.testing.assert_allclose(ours(adamw_step), by_torch(torch.optim.AdamW, lr=1e-3), rtol=1e-12)
        np.testing.assert_allclose(ours(sgd_step), by_torch(torch.optim.SGD, lr=1e-3), rtol=1e-12)

    @given(
        hnp.arrays(float, (8, 3), elements=st.floats(-1e6, 1e6)),
        st.floats(0, 1),
        st.tuples(st.floats(0.1, 0.999), st.floats(0, 0.9999)),  # torch's lerp cancels for tiny β₁
        st.floats(1e-10, 1.0),
        st.floats(0, 5),
    )
    def test_any_gradients_and_any_parameters(self, gradients, lr, betas, eps, decay):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        for step, optimizer in ((adam_step, torch.optim.Adam), (adamw_step, torch.optim.AdamW)):
            theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
            oracle = optimizer([theta], **options)
            for gradient in gradients:
                theta.grad = torch.tensor(gradient)
                oracle.step()
            path = trajectory(step, lambda _, k: gradients[k - 1], [1.0, -2.0, 0.5], 8, **options)
            np.testing.assert_allclose(path[-1], theta.detach(), rtol=1e-10, atol=1e-10)


class TestArrays:
    def test_tensors_keep_their_type_and_equal_arrays(self):
        theta, state = torch.tensor(START, dtype=torch.float32), None
        for gradient in GRADIENTS:
            theta, state = adamw_step(theta, torch.tensor(gradient, dtype=torch.float32), state, lr=0.01)
        assert theta.dtype == torch.float32 and state.step == 50 and state.second.dtype == torch.float32
        np.testing.assert_allclose(theta, ours(adamw_step, lr=0.01)[-1], rtol=1e-4, atol=1e-5)

    def test_numbers_work_and_nothing_is_changed_in_place(self):
        theta, gradient = np.ones(2), np.full(2, 3.0)
        state = adam_step(theta, gradient)[1]
        before = [array.copy() for array in state[1:]]
        adam_step(theta, gradient, state, weight_decay=1.0)
        sgd_step(theta, gradient, sgd_step(theta, gradient)[1], momentum=0.9)
        assert theta.tolist() == [1, 1] and gradient.tolist() == [3, 3]
        np.testing.assert_array_equal(before, state[1:])
        assert adam_step(1.0, 2.0, lr=0.5)[0] == pytest.approx(0.5)

    @pytest.mark.parametrize("step", [sgd_step, sgdw_step, adam_step, adamw_step])
    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_the_state_does_not_share_memory_with_the_gradient(self, step, make):
        gradient = make([1.0, 2.0])
        state = step(make([0.0, 0.0]), gradient)[1]
        before = [np.copy(np.asarray(part)) for part in state]
        gradient *= 0
        for part, copy in zip(state, before, strict=True):
            np.testing.assert_array_equal(part, copy)

    @pytest.mark.parametrize("step", [sgd_step, sgdw_step, adam_step, adamw_step])
    def test_columns_of_rates_and_decays_are_independent_runs(self, step):
        rates, decays = np.array([[0.1], [0.01], [0.001]]), np.array([[0.0], [1.0], [3.0]])
        gradients = np.random.default_rng(5).normal(size=(20, 4))
        together = trajectory(
            step, lambda theta, k: np.tile(gradients[k - 1], (3, 1)), np.ones((3, 4)), 20, lr=rates, weight_decay=decays
        )
        for i in range(3):
            alone = trajectory(
                step, lambda theta, k: gradients[k - 1], np.ones(4), 20, lr=rates[i, 0], weight_decay=decays[i, 0]
            )
            np.testing.assert_array_equal(together[:, i], alone)


class TestDecay:
    """What is left of a weight: the numbers that the notebook quotes, by other ways."""

    def test_sgd_with_l2_is_sgdw_but_not_with_momentum(self):
        options = {"lr": 1e-4, "weight_decay": 3.0}
        np.testing.assert_allclose(ours(sgd_step, **options), ours(sgdw_step, **options), rtol=1e-13)
        with_l2, decoupled = (
            trajectory(step, lambda theta, k: 0 * theta, 1.0, 20, lr=0.1, weight_decay=0.1, momentum=0.9)[-1]
            for step in (sgd_step, sgdw_step)
        )
        assert decoupled == pytest.approx(0.99**20)
        companion = np.linalg.matrix_power([[1.9 - 0.01, -0.9], [1.0, 0.0]], 19) @ [0.99, 1.0]
        assert with_l2 == pytest.approx(companion[0])

    @pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0, 100.0])
    def test_without_loss_gradient_adam_with_l2_ignores_the_decay(self, decay):
        path = trajectory(adam_step, lambda theta, k: 0 * theta, [1.0, -1.0], 100, lr=1e-3, weight_decay=decay)
        assert path[-1] == pytest.approx([0.90175, -0.90175], abs=1e-5)

    def test_without_loss_gradient_adamw_is_exponential(self):
        path = trajectory(adamw_step, lambda theta, k: 0 * theta, 2.0, 1000, lr=1e-3, weight_decay=0.5)
        assert path == pytest.approx(2 * (1 - 5e-4) ** np.arange(1001))

    def test_noise_shields_from_l2_and_not_from_adamw(self):
        sigma, rng = np.array([[0.01], [0.1], [1], [10], [100]]), np.random.default_rng(0)
        noise = rng.normal(size=(2000, 5, 200))
        noise = sigma * np.concatenate([noise, -noise], axis=2)
        kept = [
            trajectory(step, lambda theta, k: noise[k - 1], np.ones((5, 400)), 2000, lr=1e-3, weight_decay=0.1)[-1]
            for step in (adam_step, adamw_step)
        ]
        assert kept[0].mean(axis=1) == pytest.approx([0.023, 0.190, 0.819, 0.980, 0.998], abs=2e-3)
        assert kept[1].mean(axis=1) == pytest.approx(np.full(5, (1 - 1e-4) ** 2000), abs=1e-6)


class TestClosedForms:
    def test_ratio_is_that_of_two_runs(self):
        options = {"lr": 1.0, "eps": 0.0, "betas": (0.8, 0.97)}
        stream = np.random.default_rng(6).normal(size=40)
        raw, corrected = (
            np.diff(trajectory(adam_step, lambda _, k: stream[k - 1], 0.0, 40, bias_correction=on, **options))
            for on in (False, True)
        )
        np.testing.assert_allclose(raw / corrected, uncorrected_ratio(np.arange(1, 41), (0.8, 0.97)), rtol=1e-9)

    def test_ratio_by_hand(self):
        assert uncorrected_ratio(1) == pytest.approx(0.1 / np.sqrt(0.001))
        ratios = uncorrected_ratio(np.arange(1, 1000))
        assert ratios.argmax() + 1 == 12 and ratios.max() == pytest.approx(6.5685, abs=1e-4)

    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.9, 0.95)])
    def test_largest_step_is_reached_and_never_exceeded(self, betas):
        counts = np.arange(1, 31)
        grid = np.random.default_rng(7).normal(size=(30, 2000)) ** 3
        worst = (betas[1] / betas[0]) ** np.arange(30)[:, None]
        tried = np.concatenate([grid, worst], axis=1)
        path = trajectory(adam_step, lambda _, k: tried[k - 1], np.zeros(2001), 30, lr=1.0, eps=0.0, betas=betas)
        steps = np.abs(np.diff(path, axis=0))
        bound = largest_step(counts, betas)
        assert (steps.max(axis=1) <= bound + 1e-12).all()
        np.testing.assert_allclose(steps[:, -1], bound, rtol=1e-10)

    def test_largest_step_by_a_general_optimiser(self):
        """The largest eigenvalue of the pencil (w wᵀ, diag u) is max (w·g)²/(g·u g), whatever g is."""
        t, (b1, b2) = 25, (0.9, 0.999)
        ages = np.arange(t)
        w, u = (1 - b1) * b1**ages / (1 - b1**t), (1 - b2) * b2**ages / (1 - b2**t)
        scaled = w / np.sqrt(u)
        assert largest_step(t) == pytest.approx(np.sqrt(np.linalg.eigvalsh(np.outer(scaled, scaled))[-1]))
        assert largest_step(10**6) == pytest.approx(7.2703, abs=1e-4)

    @pytest.mark.parametrize(
        ("lr", "decay", "beta1"), [(0.01, 1.0, 0.0), (0.01, 1.0, 0.9), (0.1, 0.5, 0.99), (0.5, 3.0, 0.9)]
    )
    def test_equilibrium_solves_the_lyapunov_equation(self, lr, decay, beta1):
        """The stationary covariance of (θ, u) as a linear system in its three entries."""
        keep = 1 - lr * decay
        move = np.array([[keep, -lr * beta1], [0.0, beta1]])
        noise = (1 - beta1) * np.array([-lr, 1.0])
        covariance = np.linalg.solve(np.eye(4) - np.kron(move, move), np.outer(noise, noise).ravel()).reshape(2, 2)
        assert equilibrium_rms(lr, decay, beta1) == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-12)

    def test_equilibrium_of_simulated_runs(self):
        rng = np.random.default_rng(8)
        path = trajectory(
            adamw_step, lambda theta, k: 7 * rng.normal(size=300), np.zeros(300), 3000, lr=0.01, weight_decay=1.0
        )
        assert np.sqrt((path[500:] ** 2).mean()) == pytest.approx(equilibrium_rms(0.01, 1.0), rel=0.02)
        assert equilibrium_rms(1e-4, 1e-2) == pytest.approx(np.sqrt(1e-4 / 2e-2), rel=1e-4)


NAN = float("nan")
BAD = ({"lr": -1e-3}, {"weight_decay": -0.1})
BAD_ADAM = (
    {"eps": -1e-8},
    {"betas": (-0.1, 0.999)},
    {"betas": (1.0, 0.999)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, -0.5)},
    {"betas": (0.9, NAN)},
)


class TestBadInput:
    @pytest.mark.parametrize("bad", [*BAD, *BAD_ADAM, {"lr": NAN}, {"weight_decay": NAN}], ids=str)
    def test_adam_refuses_what_torch_refuses(self, bad):
        for step, optimizer in ((adam_step, torch.optim.Adam), (adamw_step, torch.optim.AdamW)):
            with pytest.raises(ValueError):
                optimizer([torch.ones(1)], **bad)
            with pytest.raises(ValueError, match=next(iter(bad))):
                step(1.0, 1.0, **bad)

    @pytest.mark.parametrize("bad", [*BAD, {"momentum": -0.9}], ids=str)
    def test_sgd_refuses_what_torch_refuses(self, bad):
        with pytest.raises(ValueError):
            torch.optim.SGD([torch.ones(1)], **bad)
        for step in (sgd_step, sgdw_step):
            with pytest.raises(ValueError, match=next(iter(bad))):
                step(1.0, 1.0, **bad)

    @pytest.mark.parametrize("bad", [{"lr": NAN}, {"weight_decay": NAN}, {"momentum": NAN}], ids=str)
    def test_sgd_refuses_nan_too_which_torch_lets_through(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sgd_step(1.0, 1.0, **bad)

    @pytest.mark.parametrize(
        "fine", [{"lr": 0}, {"lr": float("inf")}, {"betas": (0.0, 0.0)}, {"eps": 0.0}, {"weight_decay": 0}], ids=str
    )
    def test_what_torch_accepts_is_accepted(self, fine):
        torch.optim.Adam([torch.ones(1)], **fine)
        adam_step(1.0, 1.0, **fine)

    def test_one_bad_rate_among_many(self):
        with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
            adam_step(np.ones((2, 3)), np.ones((2, 3)), lr=np.array([[1.0], [-1.0]]))
        with pytest.raises(ValueError, match="weight_decay"):
            adamw_step(torch.ones(2), torch.ones(2), weight_decay=torch.tensor([0.1, -0.1]))

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"gradient has shape \(3,\), expected \(2,\)"):
            adam_step(np.ones(2), np.ones(3))
        with pytest.raises(ValueError, match=r"state is of parameters of shape \(3,\), expected \(2,\)"):
            adam_step(np.ones(2), np.ones(2), adam_step(np.ones(3), np.ones(3))[1])
        with pytest.raises(ValueError, match=r"lr of shape \(3, 1\) does not broadcast to theta's shape \(4,\)"):
            adam_step(np.ones(4), np.ones(4), lr=np.ones((3, 1)))
        with pytest.raises(ValueError, match="broadcast"):
            sgd_step(np.ones(4), np.ones(4), weight_decay=np.ones(3))
        with pytest.raises(ValueError, match="state is of"):
            sgd_step(np.ones(2), np.ones(2), sgd_step(1.0, 1.0)[1], momentum=0.9)

    def test_trajectories(self):
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            trajectory(adam_step, lambda theta, k: theta, 1.0, 0)
        with pytest.raises(ValueError, match="start must be finite"):
            trajectory(adam_step, lambda theta, k: theta, [1.0, np.inf], 3)
        with pytest.raises(ValueError, match="gradient at step 2 is not finite"):
            trajectory(adam_step, lambda theta, k: theta if k < 2 else theta * np.nan, [1.0], 3)

    def test_closed_forms(self):
        with pytest.raises(ValueError, match="step counts from 1"):
            uncorrected_ratio([0, 1])
        with pytest.raises(ValueError, match="β₁² < β₂"):
            largest_step(3, (0.9, 0.8))
        with pytest.raises(ValueError, match="β₁² < β₂"):
            largest_step(3, (0.5, 0.0))
        for bad in ((0.0, 1.0), (1.0, 2.0), (1.0, -1.0), (-1.0, -1.0), (np.nan, 1.0)):
            with pytest.raises(ValueError, match="settles only if"):
                equilibrium_rms(*bad)
        with pytest.raises(ValueError, match=r"betas\[0\]"):
            equilibrium_rms(0.1, 0.1, 1.0)

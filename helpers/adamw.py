"""SGD, SGDW, Adam and AdamW: one step at a time, with L2 regularization or with decoupled weight decay.

Equation numbers are those of ``notebooks/02_adamw.ipynb``. Sources: Kingma & Ba 2015 (Adam: A Method for Stochastic
Optimization, arXiv 1412.6980); Loshchilov & Hutter 2019 (Decoupled Weight Decay Regularization, arXiv 1711.05101).
Parameters have the meaning and the bounds that they have in ``torch.optim``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", float, NDArray, "torch.Tensor")
Rate: TypeAlias = "float | NDArray | torch.Tensor"


class SGDState(NamedTuple):
    """What SGD with momentum remembers: `velocity`, shape of the parameters."""

    velocity: Any


class AdamState(NamedTuple):
    """What Adam remembers: the number of steps so far and the two moments, each in the shape of the parameters."""

    step: int
    first: Any
    second: Any


def sgd_step(
    theta: Array,
    gradient: Array,
    state: SGDState | None = None,
    *,
    lr: Rate = 1e-3,
    momentum: float = 0.0,
    weight_decay: Rate = 0.0,
) -> tuple[Array, SGDState]:
    """Step of SGD with L2 regularization: the decay joins the gradient; left side of Eq. (9).

    Parameters
    ----------
    theta
        The parameters: a number, an array or a torch tensor of floating type. It is not changed.
    gradient
        Gradient of the loss at `theta`, without the penalty; same shape.
    state
        What the step before returned; None before the first step.
    lr
        Learning rate α ≥ 0: a number, or an array that broadcasts to theta's shape, such as one rate for each run.
    momentum
        μ ≥ 0; the velocity is μ times the former velocity plus the gradient.
    weight_decay
        λ ≥ 0, a number or an array like `lr`.

    Returns
    -------
    theta, state
        The parameters after the step, and what to pass to the next one.

    Raises
    ------
    ValueError
        A shape does not fit, or a parameter lies outside its bounds; the same bounds as in torch.
    """
    _check(theta, gradient, state, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return _sgd_move(theta, gradient + weight_decay * theta, state, lr, momentum)


def sgdw_step(
    theta: Array,
    gradient: Array,
    state: SGDState | None = None,
    *,
    lr: Rate = 1e-3,
    momentum: float = 0.0,
    weight_decay: Rate = 0.0,
) -> tuple[Array, SGDState]:
    """Step of SGD with decoupled weight decay: first shrink by 1 - αλ, then move; right side of Eq. (9).

    Parameters, returns and errors are those of `sgd_step`. In Loshchilov & Hutter's algorithm 1, the decay is not
    multiplied by α, and α stands inside the velocity, which differs when α changes along the way.
    """
    _check(theta, gradient, state, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return _sgd_move(theta * (1 - lr * weight_decay), gradient, state, lr, momentum)


def _sgd_move(
    theta: Array, gradient: Array, state: SGDState | None, lr: Any, momentum: float
) -> tuple[Array, SGDState]:
    # 1 * makes a copy: who reuses the gradient's memory must not change the state
    velocity = 1 * gradient if state is None else momentum * state.velocity + gradient
    return theta - lr * velocity, SGDState(velocity)


def adam_step(
    theta: Array,
    gradient: Array,
    state: AdamState | None = None,
    *,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.0,
    bias_correction: bool = True,
) -> tuple[Array, AdamState]:
    """Step of Adam with L2 regularization: the decay joins the gradient and passes both moments; Eq. (5), section 5.

    Parameters
    ----------
    theta
        The parameters: a number, an array or a torch tensor of floating type. It is not changed.
    gradient
        Gradient of the loss at `theta`, without the penalty; same shape.
    state
        What the step before returned; None before the first step.
    lr
        Learning rate α ≥ 0: a number, or an array that broadcasts to theta's shape, such as one rate for each run.
    betas
        β₁ and β₂ of the two exponential averages, each in [0, 1).
    eps
        ε ≥ 0, added to the root of the corrected second moment.
    weight_decay
        λ ≥ 0, a number or an array like `lr`.
    bias_correction
        False leaves out the division by 1 - βᵗ, to see what it is good for.

    Returns
    -------
    theta, state
        The parameters after the step, and what to pass to the next one.

    Raises
    ------
    ValueError
        A shape does not fit, or a parameter lies outside its bounds; the same bounds as in torch.
    """
    _check(theta, gradient, state, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_betas(betas)
    return _adam_move(theta, gradient + weight_decay * theta, state, lr, betas, eps, bias_correction)


def adamw_step(
    theta: Array,
    gradient: Array,
    state: AdamState | None = None,
    *,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rate = 0.01,
    bias_correction: bool = True,
) -> tuple[Array, AdamState]:
    """Step of AdamW: first shrink by 1 - αλ, then Adam's step on the bare gradient; section 5 and Eq. (18).

    Parameters, returns and errors are those of `adam_step`. As in torch, and unlike in Loshchilov & Hutter's
    algorithm 2, the decay is multiplied by α.
    """
    _check(theta, gradient, state, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_betas(betas)
    return _adam_move(theta * (1 - lr * weight_decay), gradient, state, lr, betas, eps, bias_correction)


def _adam_move(
    theta: Array,
    gradient: Array,
    state: AdamState | None,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
) -> tuple[Array, AdamState]:
    step, first, second = state or AdamState(0, 0 * gradient, 0 * gradient)
    step += 1
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient * gradient
    correction1, correction2 = (1 - beta**step if bias_correction else 1.0 for beta in betas)
    scale = (second / correction2) ** 0.5 + eps
    return theta - first * (lr / correction1) / scale, AdamState(step, first, second)


def trajectory(
    step: Callable[..., tuple[NDArray, Any]],
    gradient: Callable[[NDArray, int], NDArray],
    start: ArrayLike,
    count: int,
    **parameters: Any,
) -> NDArray[np.float64]:
    """Take `count` steps from `start` and return the whole path.

    Parameters
    ----------
    step
        One of the step functions of this module.
    gradient
        ``gradient(theta, k)`` returns the gradient at `theta` in step k, in theta's shape. k counts from 1.
    start
        θ₀: a number, or an array with one entry for each coordinate or independent run.
    count
        Number of steps, at least 1.
    **parameters
        Passed on to `step`: lr, betas, weight_decay …

    Returns
    -------
    ndarray, shape (count + 1, *start.shape)
        θ₀ first.

    Raises
    ------
    ValueError
        `count` is below 1, the start or a gradient is not finite, or as in `step`.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    theta, state = np.array(start, dtype=float), None
    if not np.isfinite(theta).all():
        raise ValueError(f"start must be finite, got {theta}")
    path = np.empty((count + 1, *theta.shape))
    path[0] = theta
    for k in range(1, count + 1):
        slope = np.asarray(gradient(theta, k), dtype=float)
        if not np.isfinite(slope).all():
            raise ValueError(f"the gradient at step {k} is not finite: {slope}")
        theta, state = step(theta, slope, state, **parameters)
        path[k] = theta
    return path


def uncorrected_ratio(step: ArrayLike, betas: tuple[float, float] = (0.9, 0.999)) -> NDArray[np.float64]:
    """How many times as long Adam's step number t is without bias correction, (1 - β₁ᵗ)/√(1 - β₂ᵗ); Eq. (6).

    Parameters
    ----------
    step
        t, from 1 on; any shape.
    betas
        β₁ and β₂, β₂ > 0.

    Returns
    -------
    ndarray, shape of `step`
        Exact for any gradients if ε = 0.
    """
    t = np.asarray(step, dtype=float)
    _check_betas(betas)
    if (t < 1).any():
        raise ValueError(f"step counts from 1, got {t.min():g}")
    return (1 - betas[0] ** t) / np.sqrt(1 - betas[1] ** t)


def largest_step(step: ArrayLike, betas: tuple[float, float] = (0.9, 0.999)) -> NDArray[np.float64]:
    """Largest length, in units of α, that Adam's step number t can have for any gradients; Eq. (8).

    Parameters
    ----------
    step
        t, from 1 on; any shape.
    betas
        β₁ and β₂ with β₁² < β₂: otherwise there is no bound for all t.

    Returns
    -------
    ndarray, shape of `step`
        The least upper bound for ε = 0; it is reached by gradients that grow by β₂/β₁ in each step.
    """
    t = np.asarray(step, dtype=float)
    _check_betas(betas)
    if not betas[0] ** 2 < betas[1]:
        raise ValueError(f"a bound needs β₁² < β₂, got betas={betas}")
    ratio = betas[0] ** 2 / betas[1]
    bound = (1 - betas[0]) / np.sqrt(1 - betas[1]) * np.sqrt((1 - ratio**t) / (1 - ratio))
    return bound / uncorrected_ratio(t, betas)


def equilibrium_rms(lr: ArrayLike, weight_decay: ArrayLike, beta1: float = 0.9) -> NDArray[np.float64]:
    """Root mean square of a weight under AdamW when its gradient is white noise, in the long run; Eq. (16).

    Parameters
    ----------
    lr, weight_decay
        α > 0 and λ > 0 with αλ < 2.
    beta1
        β₁ in [0, 1). β₂ is taken near 1, so that √v̂ is the noise's root mean square.

    Returns
    -------
    ndarray
        Near √(α/2λ) when αλ is far below 1 - β₁.

    Raises
    ------
    ValueError
        The weight would never settle, or β₁ lies outside [0, 1).
    """
    _check_betas((beta1, 0.0))
    lr, weight_decay = np.asarray(lr, dtype=float), np.asarray(weight_decay, dtype=float)
    keep = 1 - lr * weight_decay
    if not ((lr > 0) & (np.abs(keep) < 1)).all():
        raise ValueError(f"a weight settles only if lr > 0 and 0 < lr · weight_decay < 2, got {lr=}, {weight_decay=}")
    smoothing = (1 - beta1) / (1 + beta1) * (1 + keep * beta1) / (1 - keep * beta1)
    return lr * np.sqrt(smoothing / (1 - keep**2))


def _check(theta: Any, gradient: Any, state: SGDState | AdamState | None, **parameters: Any) -> None:
    """Raise ValueError when shapes do not fit together or a parameter is negative or NaN."""
    shape = tuple(np.shape(theta))
    if tuple(np.shape(gradient)) != shape:
        raise ValueError(f"the gradient has shape {tuple(np.shape(gradient))}, expected {shape} as theta")
    if state is not None and tuple(np.shape(state[-1])) != shape:
        raise ValueError(f"the state is of parameters of shape {tuple(np.shape(state[-1]))}, expected {shape} as theta")
    for name, value in parameters.items():
        smallest = value
        if not isinstance(value, (int, float)):
            smallest = np.min(np.asarray(value))
            size = tuple(np.shape(value))
            if len(size) > len(shape) or np.broadcast_shapes(size, shape) != shape:
                raise ValueError(f"{name} of shape {size} does not broadcast to theta's shape {shape}")
        if not smallest >= 0:  # also refuses NaN
            raise ValueError(f"{name} must be at least 0, got {smallest}")


def _check_betas(betas: tuple[float, float]) -> None:
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")

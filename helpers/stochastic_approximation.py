"""Stochastic approximation: find a root, a mean or a minimum from noisy measurements, one at a time.

Equation numbers are those of ``notebooks/01_stochastic_approximation.ipynb``. Sources: Robbins & Monro 1951
(A Stochastic Approximation Method, Ann. Math. Statist. 22); Polyak & Juditsky 1992 (Acceleration of Stochastic
Approximation by Averaging, SIAM J. Control Optim. 30); Zhao 2025 (Mathematical Foundations of Reinforcement
Learning, ch. 6).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Measure = Callable[[NDArray, int], NDArray]
Gradient = Callable[[NDArray, NDArray], NDArray]


def running_mean(observations: ArrayLike) -> NDArray[np.floating]:
    """Mean of the first k observations for every k, without ever holding a sum; Eq. (2).

    Parameters
    ----------
    observations
        The stream x_1 … x_n, shape (n, ...). Its floating-point type is kept, integers become float64.

    Returns
    -------
    ndarray, shape (n, ...)
        Entry k-1 is the mean of x_1 … x_k.

    Raises
    ------
    ValueError
        The stream is empty or holds a value that is not finite.
    """
    x = np.asarray(observations)
    if x.dtype.kind != "f":
        x = x.astype(float)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"observations must be a stream of at least one value, got shape {x.shape}")
    _require_finite(x, "observations")
    means = np.empty_like(x)
    mean = np.zeros_like(x[0])[()]
    for k in range(len(x)):
        mean = mean - (mean - x[k]) / x.dtype.type(k + 1)
        means[k] = mean
    return means


def power_steps(exponent: float, count: int, *, scale: float = 1.0, shift: float = 0.0) -> NDArray[np.float64]:
    """Step sizes a_k = scale / (k + shift)**exponent for k = 1 … count.

    Parameters
    ----------
    exponent
        1 is Robbins and Monro's own choice, 0 a constant step.
    count
        Number of steps.
    scale, shift
        Size of the steps, and how many of the first, largest ones are skipped; scale > 0, shift > -1.

    Raises
    ------
    ValueError
        `count` is below 1, `scale` is not positive or `shift` not above -1.
    """
    if count < 1 or scale <= 0 or shift <= -1:
        raise ValueError(f"need count ≥ 1, scale > 0 and shift > -1, got {count=}, {scale=}, {shift=}")
    return scale / (np.arange(1, count + 1) + shift) ** exponent


def robbins_monro(
    measure: Measure, start: ArrayLike, steps: ArrayLike, *, freeze_beyond: float = np.inf
) -> NDArray[np.float64]:
    """Iterate w_{k+1} = w_k - a_k g̃(w_k, η_k); Eq. (6), Robbins & Monro 1951.

    Parameters
    ----------
    measure
        ``measure(w, k)`` returns noisy observations of g at `w`, in w's shape. k counts from 1.
    start
        w_1: a number, or an array with one entry per independent run (or per coordinate).
    steps
        a_1 … a_n, shape (n,), positive.
    freeze_beyond
        A run whose ``abs(w)`` exceeds this bound stays where it is from then on: it has diverged.

    Returns
    -------
    ndarray, shape (n + 1, *start.shape)
        The whole path, w_1 first.

    Raises
    ------
    ValueError
        A step is not positive, an observation is not finite or has another shape than w.
    """
    w = np.array(start, dtype=float)
    _require_finite(w, "start")
    a = _checked_steps(steps)
    path = np.empty((len(a) + 1, *w.shape))
    path[0] = w
    for k, step in enumerate(a.tolist(), 1):
        observed = np.asarray(measure(w, k), dtype=float)
        if observed.shape != w.shape:
            raise ValueError(f"measure returned shape {observed.shape} at step {k}, expected {w.shape} as of w")
        if freeze_beyond < np.inf:
            observed = np.where(np.abs(w) <= freeze_beyond, observed, 0.0)
        if not np.isfinite(observed).all():
            _require_finite(observed, f"the observation at step {k}")
        w = w - step * observed
        path[k] = w
    return path


def polyak_ruppert(path: ArrayLike) -> NDArray[np.float64]:
    """Average of the iterates so far, w̄_k = (w_1 + … + w_k)/k, for every k; Eq. (16), Polyak & Juditsky 1992.

    Parameters
    ----------
    path
        Iterates, shape (n, ...).

    Returns
    -------
    ndarray, shape (n, ...)
    """
    path = np.asarray(path, dtype=float)
    if path.ndim == 0 or len(path) == 0:
        raise ValueError(f"path must hold at least one iterate along its first axis, got shape {path.shape}")
    count = np.arange(1, len(path) + 1).reshape(-1, *[1] * (path.ndim - 1))
    return np.cumsum(path, axis=0) / count


def linear_mse(
    steps: ArrayLike, *, slope: float = 1.0, noise_variance: float = 1.0, start: float = 0.0
) -> NDArray[np.float64]:
    """Exact mean squared error V_k = E[(w_k - w*)²] when g(w) = slope (w - w*); Eq. (13).

    Parameters
    ----------
    steps
        a_1 … a_n, shape (n,), positive.
    slope
        The slope h of g.
    noise_variance
        Variance σ² of one measurement.
    start
        V_1, the squared distance at the start.

    Returns
    -------
    ndarray, shape (n + 1,)
        V_1 … V_{n+1}.
    """
    a = _checked_steps(steps)
    if noise_variance < 0 or start < 0:
        raise ValueError(f"a variance is not negative, got {noise_variance=}, {start=}")
    variance = np.empty(len(a) + 1)
    variance[0] = start
    shrink, added = (1 - a * slope) ** 2, a**2 * noise_variance
    for k, (factor, noise) in enumerate(zip(shrink.tolist(), added.tolist(), strict=True), 1):
        start = variance[k] = factor * start + noise
    return variance


def stochastic_gradient_descent(
    gradient: Gradient,
    start: ArrayLike,
    steps: ArrayLike,
    *,
    sample_count: int,
    batch_size: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Mini-batch gradient descent on an average over `sample_count` samples; Eq. (18).

    Parameters
    ----------
    gradient
        ``gradient(w, rows)`` returns the average gradient over the samples with these indices, in w's shape.
    start
        w_1, shape (d,) or any other.
    steps
        a_1 … a_n, shape (n,), positive.
    sample_count
        Number of samples in the data set.
    batch_size
        Samples per step, drawn without replacement within a step: 1 is SGD, `sample_count` is batch descent.
    rng
        Source of the draws.

    Returns
    -------
    ndarray, shape (n + 1, *start.shape)
        The whole path, w_1 first.

    Raises
    ------
    ValueError
        `batch_size` does not lie in 1 … `sample_count`, or as in `robbins_monro`.
    """
    if not 1 <= batch_size <= sample_count:
        raise ValueError(f"batch_size must lie between 1 and sample_count={sample_count}, got {batch_size}")

    def measure(w: NDArray, k: int) -> NDArray:
        return gradient(w, rng.choice(sample_count, batch_size, replace=False, shuffle=False))

    return robbins_monro(measure, start, steps)


def _checked_steps(steps: ArrayLike) -> NDArray[np.float64]:
    a = np.asarray(steps, dtype=float)
    if a.ndim != 1:
        raise ValueError(f"steps must have shape (n,), one number per step, got shape {a.shape}")
    wrong = np.flatnonzero(~(np.isfinite(a) & (a > 0)))
    if wrong.size:
        raise ValueError(f"steps must be positive and finite, but step {wrong[0] + 1} is {a[wrong[0]]}")
    return a


def _require_finite(values: NDArray, what: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        place = f" at index {at[0] if len(at) == 1 else at}" if at else ""
        raise ValueError(f"{what} must be finite, got {values[at]}{place}")

"""HiPPO: a handful of numbers that hold the whole past of a signal, and how to keep them up to date.

The numbers are the coefficients of a polynomial that comes as close to the past as one of its degree can. Equations
are those of 12_hippo. Sources: A. Gu and others, "HiPPO: recurrent memory with optimal polynomial projections"
(arXiv 2008.07669), its appendix D for the three measures; A. Voelker and others, "Legendre memory units" (2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Float = NDArray[np.float64]

MEASURES = ("legs", "legt", "lagt")
METHODS = ("euler", "backward", "bilinear", "exact")


# --- The polynomials, and the best coefficients


def legendre(n: int, s: ArrayLike) -> Float:
    """Evaluate g_0 … g_{n-1}, the Legendre polynomials that are orthonormal on [0, 1]. Eqs. (1) and (6).

    Parameters
    ----------
    n
        How many.
    s : array of any shape
        0 is the beginning of the window, 1 is now.

    Returns
    -------
    ndarray, shape (*s.shape, n)
    """
    _require_count(n)
    s = _points(s, "s")
    values = np.polynomial.legendre.legvander(2 * s - 1, n - 1).reshape(*s.shape, n)  # of a number, numpy makes a row
    return values * np.sqrt(2 * np.arange(n) + 1)


def laguerre(n: int, age: ArrayLike) -> Float:
    """Evaluate l_0 … l_{n-1}, the Laguerre functions L_k(age) e^(-age/2), orthonormal on [0, ∞). Eq. (13).

    Parameters
    ----------
    n
        How many.
    age : array of any shape
        How long ago, not negative.

    Returns
    -------
    ndarray, shape (*age.shape, n)
    """
    _require_count(n)
    age = _points(age, "age")
    if (age < 0).any():
        raise ValueError(f"age must not be negative: the functions live on [0, ∞), got {age.min()}")
    age = np.minimum(age, 1e100)  # all is 0 long before, and the square of a larger age would overflow
    # The polynomials overflow and e^(-age/2) underflows where their product does neither: the scale goes into `log`.
    log, last, this = -age / 2, np.ones_like(age), 1 - age
    values = [np.exp(log), this * np.exp(log)]
    for k in range(1, n - 1):
        last, this = this, ((2 * k + 1 - age) * this - k * last) / (k + 1)
        size = np.maximum(np.abs(last), np.abs(this))
        scale = np.where(size > 1e100, size, 1.0)
        last, this, log = last / scale, this / scale, log + np.log(scale)
        values.append(this * np.exp(log))
    return np.stack(values[:n], axis=-1)


def project(u: ArrayLike, n: int) -> Float:
    """Compute the n best coefficients of a staircase that is u[k] on the k-th of K equal pieces. Eq. (2).

    Exact, from the antiderivative of each polynomial; it needs the whole past at once.

    Parameters
    ----------
    u : array of shape (..., K)

    Returns
    -------
    ndarray, shape (..., n)
    """
    u = _signal(u)
    _require_count(n)
    edges = np.polynomial.legendre.legvander(2 * np.arange(u.shape[-1] + 1) / u.shape[-1] - 1, n)
    degree = np.arange(n)
    # The derivative of (P_{n+1} - P_{n-1}) / (2n + 1) is P_n, by (7), and that of P_1 is P_0; ds is dz/2.
    before = np.concatenate([np.zeros((len(edges), 1)), edges[:, : n - 1]], axis=1)
    antiderivative = (edges[:, 1:] - before) / (2 * np.sqrt(2 * degree + 1))
    return u @ np.diff(antiderivative, axis=0)


def reconstruct(c: ArrayLike, s: ArrayLike) -> Float:
    """Redraw a past from its coefficients: the sum of c_n g_n(s); s is 0 at the beginning and 1 now. Eq. (1).

    Parameters
    ----------
    c : array of shape (..., n)
    s : number, or array of shape (m,)

    Returns
    -------
    ndarray, shape (...) or (..., m)
    """
    c = _finite(_floats(c), "c").astype(float)
    if np.ndim(s) > 1:
        raise ValueError(f"s must be a number or have shape (m,), got {np.shape(s)}")
    return c @ legendre(c.shape[-1], s).T


# --- Differential equations that keep the coefficients up to date


def transition(measure: str, n: int) -> tuple[Float, Float]:
    """Build A and B of the differential equation of n coefficients.

    Parameters
    ----------
    measure
        "legs": the whole past, equally weighted, t c' = A c + B u, eq. (12). "legt": a window of length θ that slides,
        θ c' = A c + B u, eq. (10). "lagt": a past that fades, c' = A c + B u, eq. (13).
    n
        How many coefficients.

    Returns
    -------
    A : ndarray, shape (n, n)
    B : ndarray, shape (n,)
    """
    _require_measure(measure)
    _require_count(n)
    row, col = np.mgrid[:n, :n]
    root = np.sqrt(2 * np.arange(n) + 1)
    if measure == "lagt":
        return np.eye(n) / 2 - np.tril(np.ones((n, n))), np.ones(n)
    if measure == "legt":
        return -np.outer(root, root) * np.where(col > row, (-1.0) ** (row + col), 1), root
    # The diagonal is set apart: root² would be 2n + 1 only up to rounding.
    return 0.0 - np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0), root


def discretise(a: ArrayLike, b: ArrayLike, dt: float, method: str = "exact") -> tuple[Float, Float]:
    """Turn x' = A x + B u into x_{k+1} = Ā x_k + B̄ u_k, where u is constant for a time `dt`. Eqs. (14), (15).

    Parameters
    ----------
    a : array of shape (n, n)
    b : array of shape (n,)
    method
        "euler", "backward", "bilinear" or "exact" (zero-order hold).

    Returns
    -------
    ndarray, shape (n, n), and ndarray, shape (n,)
    """
    a, b = _points(a, "a"), _points(b, "b")
    _require_method(method)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or b.shape != a.shape[:1]:
        raise ValueError(f"a must have shape (n, n) and b shape (n,), got {a.shape} and {b.shape}")
    if not 0 < dt < np.inf:
        raise ValueError(f"dt must be positive, got {dt}")
    one = np.eye(len(a))
    if method == "euler":
        return one + dt * a, dt * b
    if method == "exact":  # one matrix exponential gives both: u is a state that does not change
        joint = np.zeros((len(a) + 1,) * 2)
        joint[:-1, :-1], joint[:-1, -1] = dt * a, dt * b
        joint = torch.linalg.matrix_exp(torch.from_numpy(joint)).numpy()
        return joint[:-1, :-1], joint[:-1, -1]
    half = dt if method == "backward" else dt / 2
    right = np.column_stack([one if method == "backward" else one + half * a, dt * b])
    both = np.linalg.solve(one - half * a, right)
    return both[:, :-1], both[:, -1]


# --- LegS in O(n) a step


def legs_product(c: ArrayLike) -> Array:
    """Multiply by A of LegS in O(n): a running sum in place of a matrix. Eq. (19).

    Parameters
    ----------
    c : array of shape (..., n)

    Returns
    -------
    ndarray, shape (..., n)
    """
    return _product(_finite(_floats(c), "c"))


def _product(c: Array) -> Array:
    degree = np.arange(c.shape[-1], dtype=c.dtype)
    root = np.sqrt(2 * degree + 1)
    return degree * c - root * np.cumsum(root * c, axis=-1)


def legs_solve(y: ArrayLike, h: float) -> Array:
    """Solve (1 - h A) x = y for A of LegS in O(n), by substitution with a running sum. Eq. (20).

    Parameters
    ----------
    y : array of shape (..., n)
    h
        Not negative; then every factor of the running sum lies between -1 and 1, and rounding errors do not grow.
        h (n + 1) must not overflow.

    Returns
    -------
    ndarray, shape (..., n)
    """
    y = _finite(_floats(y), "y")
    if not 0 <= h <= np.finfo(y.dtype).max / (y.shape[-1] + 1):
        raise ValueError(f"h must be finite and not negative, and h (n + 1) finite in {y.dtype}, got {h}")
    return _solve(y, h)


def _solve(y: Array, h: float) -> Array:
    degree = np.arange(y.shape[-1], dtype=y.dtype)
    root = np.sqrt(2 * degree + 1)
    keep, gain = (1 - h * degree) / (1 + h * (degree + 1)), 1 / (1 + h * (degree + 1))
    total, sums = 0.0, []
    # Python's own numbers are several times faster than numpy's one by one; with a batch, rows are arrays.
    added = root * gain * y
    rows = added.tolist() if y.ndim == 1 else np.moveaxis(added, -1, 0)
    for factor, term in zip(keep.tolist(), rows, strict=True):
        sums.append(total)  # the sum of root_k x_k over k < n
        total = factor * total + term
    before = np.stack(sums[1:], axis=-1) if len(sums) > 1 else np.zeros((*y.shape[:-1], 0))
    before = np.concatenate([np.zeros((*y.shape[:-1], 1)), before], axis=-1)
    return (gain * (y - h * root * before)).astype(y.dtype)


def legs_step(c: ArrayLike, u: ArrayLike, k: int, method: str = "exact") -> Array:
    """Go from k seen samples to k + 1: the new sample u held on [k, k + 1]. Eqs. (14) to (20).

    Parameters
    ----------
    c : array of shape (..., n)
        Coefficients at time k.
    u : array of shape (...)
    k
        At least 1; one sample alone has the coefficients (u, 0, 0, …).
    method
        "euler", "backward" and "bilinear" (the trapezoidal rule) cost O(n). "exact" costs O(n²).

    Returns
    -------
    ndarray, shape (..., n)
    """
    c = _finite(_floats(c), "c")
    _require_method(method)
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be at least 1, an integer: samples seen, and a divisor; got {k!r}")
    k = int(k)  # numpy's small integers would overflow at k + 1
    with np.errstate(over="ignore"):  # a u too large for the float32 of c is told below
        u = _finite(_points(u, "u").astype(c.dtype), "u")
    if u.shape != c.shape[:-1]:
        raise ValueError(f"u must have one sample for each row of c, shape {c.shape[:-1]}, got {u.shape}")
    return _step(c, u[..., None], k, method)


def _step(c: Array, u: Array, k: int, method: str) -> Array:
    """Take the step of `legs_step`, its arguments known to be good; Euler's rule may overflow here."""
    if method == "exact":
        first = u * np.eye(1, c.shape[-1], dtype=c.dtype)[0]  # a constant past u: the state where nothing changes
        return (first + _stretch(c - first, k / (k + 1))).astype(c.dtype)
    pushed = u * np.sqrt(2 * np.arange(c.shape[-1], dtype=c.dtype) + 1)
    if method == "euler":
        return c + (_product(c) + pushed) / k
    if method == "backward":
        return _solve(c + pushed / (k + 1), 1 / (k + 1))
    return _solve(c + (_product(c) + pushed) / (2 * k) + pushed / (2 * k + 2), 1 / (2 * k + 2))


def stretch(c: ArrayLike, ratio: float) -> Array:
    """Squeeze a past into the first `ratio` of a new window, zero after it: e^(A ln(1/ratio)) c. Eq. (17).

    Gauss's rule with n nodes is exact for the polynomials of degree up to 2n - 2 that occur.

    Parameters
    ----------
    c : array of shape (..., n)
        float32 stays float32; in between it is float64.
    ratio
        Old length over new length, in (0, 1].

    Returns
    -------
    ndarray, shape (..., n)
    """
    c = _finite(_floats(c), "c")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    return _stretch(c, ratio).astype(c.dtype)


def _stretch(c: Array, ratio: float) -> Float:
    """Do the work of `stretch`; the float64 of the rule makes float64 of a float32 past."""
    n = c.shape[-1]
    s, weights, old = _gauss(n)
    # Only the change is summed: then the rule's rounding error is as small as the change, and thousands of steps,
    # each of which changes little, do not add it up.
    return c + ((c @ old.T) * weights) @ (ratio * legendre(n, ratio * s) - old)


_GAUSS: dict[int, tuple[Float, Float, Float]] = {}


def _gauss(n: int) -> tuple[Float, Float, Float]:
    """Nodes and weights on [0, 1] and the polynomials there; kept, because the nodes cost more than a step."""
    if n not in _GAUSS:
        z, weights = np.polynomial.legendre.leggauss(n)
        s = (z + 1) / 2
        _GAUSS[n] = s, weights / 2, legendre(n, s)
    return _GAUSS[n]


def project_stream(
    u: ArrayLike, n: int, measure: str = "legs", method: str = "exact", theta: float | None = None
) -> Array:
    """Read a signal sample by sample and return the n coefficients after each one.

    Parameters
    ----------
    u : array of shape (..., K)
        float32 stays float32 (with "exact", steps are taken in float64 and stored in float32).
    measure, method
        As for `transition` and `discretise`.
    theta
        For "legt" the length of the window, for "lagt" the unit of age, in samples. "legs" has none.

    Returns
    -------
    ndarray, shape (..., K, n)
    """
    u = _signal(u)
    _require_measure(measure)
    _require_method(method)
    _require_count(n)
    if (theta is None) != (measure == "legs"):
        raise ValueError(f'theta is for "legt" and "lagt", and needed there; got theta={theta} for {measure!r}')
    states = np.zeros((*u.shape, n), u.dtype)
    if measure == "legs":
        states[..., 0, 0] = u[..., 0]
        for k in range(1, u.shape[-1]):
            states[..., k, :] = _step(states[..., k - 1, :], u[..., k, None], k, method)
        return states
    if not 0 < theta < np.inf:
        raise ValueError(f"theta must be positive, got {theta}")
    a, b = transition(measure, n)
    a, b = (x.astype(u.dtype) for x in discretise(a / theta, b / theta, 1.0, method))
    x = np.zeros((*u.shape[:-1], n), u.dtype)
    for k in range(u.shape[-1]):
        states[..., k, :] = x = x @ a.T + u[..., k, None] * b
    return states


# --- What is asked of the arguments


def _floats(x: ArrayLike) -> Array:
    """Keep float32 and float64, turn all else into one of them."""
    x = np.asarray(x)
    if x.dtype.kind not in "iuf":
        raise TypeError(f"expected real numbers, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"expected an array with a last axis that is not empty, got shape {x.shape}")
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32 if x.dtype == np.float16 else float)


def _finite(x: Array, name: str) -> Array:
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity: every number made from it would, too")
    return x


def _points(x: ArrayLike, name: str) -> Float:
    """Finite real numbers of any shape, as float64."""
    x = np.asarray(x)
    if x.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return _finite(x.astype(float), name)


def _signal(u: ArrayLike) -> Array:
    u = _floats(u)
    if not np.isfinite(u).all():
        raise ValueError("the signal holds NaN or infinity: fill the gaps first")
    return u


def _require_count(n: int) -> None:
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n, the number of coefficients, must be an integer of at least 1, got {n!r}")


def _require_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

"""Linear state space layers: S4's kernel, convolution, and a parallel scan for transitions that depend on the data.

Equations are those of 12_hippo. Sources: A. Gu and others, "Efficiently modeling long sequences with structured state
spaces" (arXiv 2111.00396), appendix C for the kernel; A. Gu and T. Dao, "Mamba" (arXiv 2312.00752); G. Blelloch,
"Prefix sums and their applications" (1990), for the scan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helpers.hippo import discretise, transition

Array = NDArray[Any]
Float = NDArray[np.float64]
Complex = NDArray[np.complex128]


# --- S4: the matrix of LegS, frozen


def normal_plus_low_rank(n: int) -> tuple[Complex, Float, Complex]:
    """Split A of LegS as V diag(λ) V* - p pᵀ with a unitary V. Eq. (22); Gu 2022, theorem 1.

    A + p pᵀ is -½ plus a skew-symmetric matrix. i times that is Hermitian, so its eigenvectors come out orthonormal
    to rounding at every n, while those of A itself are useless: their condition is 8e4 at n = 8 and 8e10 at n = 16.

    Returns
    -------
    eigenvalues λ : ndarray, shape (n,)
        Each with real part -½ exactly.
    p : ndarray, shape (n,)
    V : ndarray, shape (n, n)
    """
    a, b = transition("legs", n)
    p = b / np.sqrt(2)
    skew = a + np.outer(p, p) + np.eye(n) / 2
    frequencies, v = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequencies, p, v


def kernel_by_powers(a: ArrayLike, b: ArrayLike, c: ArrayLike, length: int) -> Float:
    """Kernel C B̄, C Ā B̄, C Ā² B̄, …: what the output is after one unit pulse. Eq. (23). O(length n²).

    Parameters
    ----------
    a, b : arrays of shape (n, n) and (n,)
        Of the steps, from `discretise`.
    c : array of shape (n,)

    Returns
    -------
    ndarray, shape (length,)
    """
    a, x, c = _system(a, b, c)
    _require_length(length)
    kernel = np.empty(length)
    for k in range(length):
        kernel[k] = c @ x
        x = a @ x
    return kernel


def s4_kernel(c: ArrayLike, dt: float, length: int) -> Float:
    """Compute the kernel of frozen LegS with bilinear steps from Cauchy sums, without powers. Eqs. (24) and (25).

    Parameters
    ----------
    c : array of shape (n,)
        Readout.
    dt
        Step, positive. Steps shorter than about 1 / n keep the fastest of the rates 1 … n.
    length
        Length of the kernel. Time is O(n · length) once C̃ = C(1 - Ā^length) is known.

    Returns
    -------
    ndarray, shape (length,)
    """
    c = _real(c)
    if c.ndim != 1 or not len(c):
        raise ValueError(f"c must have shape (n,), got {c.shape}")
    _require_length(length)
    n = len(c)
    a, b = transition("legs", n)
    a_bar, _ = discretise(a, b, dt, "bilinear")
    c_tilde = c - c @ np.linalg.matrix_power(a_bar, length)
    lam, p, v = normal_plus_low_rank(n)
    left, right = np.stack([c_tilde @ v, p @ v]), np.stack([v.conj().T @ b, v.conj().T @ p])

    z = np.exp(-2j * np.pi * np.arange(length) / length)
    if length % 2 == 0:
        z[length // 2] = 1.0  # z = -1 is a pole of the map to s; its value is filled in below
    s = (2 / dt) * (1 - z) / (1 + z)
    inverse = 1 / (s[:, None] - lam)
    # Four Cauchy sums at once: entry (i, j) is left_i (s - Λ)^-1 right_j.
    sums = np.einsum("in,kn,jn->kij", left, inverse, right)
    values = 2 / (1 + z) * (sums[:, 0, 0] - sums[:, 0, 1] * sums[:, 1, 0] / (1 + sums[:, 1, 1]))
    if length % 2 == 0:
        values[length // 2] = dt / 2 * (c_tilde @ b)
    return np.fft.ifft(values).real


def run_recurrence(a: ArrayLike, b: ArrayLike, c: ArrayLike, u: ArrayLike) -> Float:
    """Compute the outputs y_k = C x_k of x_k = Ā x_{k-1} + B̄ u_k from x = 0, step by step. Eq. (23).

    Parameters
    ----------
    a, b, c : arrays of shape (n, n), (n,) and (n,)
    u : array of shape (length,)

    Returns
    -------
    ndarray, shape (length,)
    """
    (a, b, c), u = _system(a, b, c), _real(u)
    if u.ndim != 1:
        raise ValueError(f"u must have shape (length,), got {u.shape}")
    x, outputs = np.zeros(len(b)), np.empty(len(u))
    for k, value in enumerate(u):
        x = a @ x + b * value
        outputs[k] = c @ x
    return outputs


def causal_convolution(kernel: ArrayLike, u: ArrayLike) -> Float:
    """Compute the outputs y_k = sum_j kernel_j u_{k-j}, by FFT in O(length log length). Eq. (23).

    Parameters
    ----------
    kernel, u : arrays of shape (length,)

    Returns
    -------
    ndarray, shape (length,)
    """
    kernel, u = _real(kernel), _real(u)
    if kernel.ndim != 1 or kernel.shape != u.shape or not len(u):
        raise ValueError(f"kernel and u must have one shape (length,), not empty, got {kernel.shape} and {u.shape}")
    size = 2 * len(u)  # room for the end of the kernel: without it the end wraps around into the beginning
    return np.fft.irfft(np.fft.rfft(kernel, size) * np.fft.rfft(u, size), size)[: len(u)]


# --- Transitions that differ from step to step


def recur(a: ArrayLike, b: ArrayLike) -> Array:
    """All states of x_k = a_k x_{k-1} + b_k from x = 0, one after the other. Eq. (27).

    Parameters
    ----------
    a, b : arrays of shape (length, ...), real or complex
        The two shapes broadcast, apart from the length, which is the same.

    Returns
    -------
    ndarray, shape (length, ...)
    """
    a, b = _pair(a, b)
    states, x = np.empty_like(b), np.zeros_like(b[0])
    for k in range(len(b)):
        states[k] = x = a[k] * x + b[k]
    return states


def scan(a: ArrayLike, b: ArrayLike) -> Array:
    """Compute the states of `recur` in about 2 log2(length) rounds; within a round all steps are independent. Eq. (28).

    Two steps after each other are one: (a, b) then (a', b') is (a' a, a' b + b'). Joined in pairs, the sequence has
    half its length; its states are every second state of the whole. Total work is O(length). Products of many a_k are
    formed on their own: they must not overflow, as 2^4096 does, also where b is 0 and the loop would not mind.

    Parameters and result as for `recur`.
    """
    a, b = _pair(a, b)
    return _scan(a, b)


def _scan(a: Array, b: Array) -> Array:
    if len(b) == 1:
        return b.copy()
    even = len(b) - len(b) % 2
    first, second = slice(0, even, 2), slice(1, even, 2)
    states = np.empty_like(b)
    states[second] = _scan(a[second] * a[first], a[second] * b[first] + b[second])
    states[0] = b[0]
    states[2::2] = a[2::2] * states[1:-1:2] + b[2::2]
    return states


def selective_ssm(
    u: ArrayLike, delta: ArrayLike, a: ArrayLike, b: ArrayLike, c: ArrayLike, *, exact_input: bool = False
) -> Float:
    """Mamba's layer for one channel: x_k = e^(Δ_k a) x_{k-1} + Δ_k b_k u_k, y_k = c_k · x_k. Eq. (29).

    Parameters
    ----------
    u, delta : arrays of shape (length,)
        Input, and the step chosen at each time, not negative.
    a : array of shape (n,)
        Diagonal of the transition, negative.
    b, c : arrays of shape (length, n)
    exact_input
        False: Δ b, as Mamba's code has it. True: (e^(Δ a) - 1) / a · b, the exact step, as in its paper.

    Returns
    -------
    ndarray, shape (length,)
    """
    u, delta, a, b, c = (_real(v) for v in (u, delta, a, b, c))
    if u.ndim != 1 or delta.shape != u.shape or a.ndim != 1 or b.shape != (*u.shape, *a.shape) or c.shape != b.shape:
        raise ValueError(
            "u and delta must have shape (length,), a shape (n,), b and c shape (length, n), "
            f"got {u.shape}, {delta.shape}, {a.shape}, {b.shape} and {c.shape}"
        )
    if not (a < 0).all() or not (delta >= 0).all():
        raise ValueError("a must be negative and delta must not be: the state would not stay bounded")
    product = delta[:, None] * a
    gain = np.expm1(product) / a if exact_input else delta[:, None]
    return (scan(np.exp(product), gain * b * u[:, None]) * c).sum(-1)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(a), np.asarray(b)
    if not a.ndim or not b.ndim or not len(b) or len(a) != len(b):
        raise ValueError(f"a and b must have one length of at least 1 on their first axis, got {a.shape} and {b.shape}")
    # The length comes first, so trailing axes are lined up by hand: (length,) goes with (length, d, e).
    dims = max(a.ndim, b.ndim)
    a, b = (x.reshape(*x.shape, *(1,) * (dims - x.ndim)) for x in (a, b))
    shape, dtype = np.broadcast_shapes(a.shape, b.shape), np.result_type(a, b, np.float32)
    return np.broadcast_to(a, shape).astype(dtype), np.broadcast_to(b, shape).astype(dtype)


def _real(x: ArrayLike) -> Float:
    x = np.asarray(x)
    if np.iscomplexobj(x):  # numpy would drop the imaginary part
        raise TypeError(f"expected real numbers, got {x.dtype}")
    x = x.astype(float)
    if not np.isfinite(x).all():  # one NaN and an FFT spreads it over all outputs, also the earlier ones
        raise ValueError("expected finite numbers, got NaN or infinity")
    return x


def _system(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> tuple[Float, Float, Float]:
    a, b, c = _real(a), _real(b), _real(c)
    if b.ndim != 1 or a.shape != (len(b), len(b)) or c.shape != b.shape:
        raise ValueError(f"a, b and c must have shapes (n, n), (n,) and (n,), got {a.shape}, {b.shape} and {c.shape}")
    return a, b, c


def _require_length(length: int) -> None:
    if not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length must be an integer of at least 1, got {length!r}")

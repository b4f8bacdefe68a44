"""`check`: the sentence under every numbered equation that a machine has verified."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import numpy as np

Relation = Literal["=", "<=", ">="]


class CheckFailed(AssertionError):
    """An equation of the text does not hold for the numbers it was tried on."""


def check(
    number: int,
    claim: str,
    left: Any,
    right: Any,
    *,
    tol: Any = None,
    rtol: float = 0.0,
    relation: Relation = "=",
) -> None:
    r"""Compare both sides of equation (`number`), computed in two different ways, and say so.

    Parameters
    ----------
    number
        The equation's number, the n of ``\tag{n}`` in the text above the cell.
    claim
        What is claimed, in a few words; it is printed.
    left, right
        The two sides: numbers, arrays or tensors of one shape (a plain number stands for an array
        filled with it), or strings or bytes, which must be equal.
    tol
        Largest allowed absolute difference, a number or an array (for example a confidence band);
        if neither it nor `rtol` is given, 0 for integers and 1e-12 for all else.
    rtol
        Allowed difference relative to ``abs(right)``, added to `tol`.
    relation
        ``"="``; or ``"<="``, ``">="`` for a bound, which may be broken by the tolerance at most.

    Raises
    ------
    CheckFailed
        With the largest violation and where it is, or when a side is empty or holds NaN.
    ValueError, TypeError
        When the two sides cannot be compared: different shapes, one object twice, a bare truth value.
    """
    label = f"({number}) {claim}"
    if relation not in ("=", "<=", ">="):
        raise ValueError(f'{label}: relation must be "=", "<=" or ">=", not {relation!r}')
    left, right = to_numpy(left), to_numpy(right)
    if _same_memory(left, right):
        raise ValueError(f"{label}: both sides are the same object, so the check could never fail")
    a, b = (_as_array(side, label) for side in (left, right))
    if a.ndim and b.ndim and a.shape != b.shape:
        raise ValueError(f"{label}: the left side has shape {a.shape}, the right side {b.shape}; make them equal")
    if a.size == 0 or b.size == 0:
        raise CheckFailed(f"{label}: there is nothing to compare, a side is empty")
    if _is_text(a) or _is_text(b):
        _compare_exactly(a, b, label, relation)
        print(f"✓ {label}   [exactly]")
        return
    for side, array in (("left", a), ("right", b)):
        if array.dtype.kind in "fc" and np.isnan(array).any():
            raise CheckFailed(f"{label}: the {side} side is NaN{_index(int(np.argmax(np.isnan(array))), array.shape)}")
    if tol is None:
        whole = a.dtype.kind in "iuO" and b.dtype.kind in "iuO"
        tol = 0.0 if rtol or whole else 1e-12
    excess, allowed = _excess(a, b, tol, rtol, relation, label)
    if (excess > allowed).any():
        worst = int(np.argmax(excess - allowed))
        x, y = (np.broadcast_to(array, excess.shape).flat[worst] for array in (a, b))
        sign = {"=": "≠", "<=": ">", ">=": "<"}[relation]
        raise CheckFailed(
            f"{label}: largest difference {excess.flat[worst]:.3g}{_index(worst, excess.shape)}: "
            f"{_digits(x)} {sign} {_digits(y)} (allowed {allowed.flat[worst]:.3g})"
        )
    print(f"✓ {label}   [{_precision(tol, rtol, relation)}]")


def _as_array(side: Any, label: str) -> np.ndarray:
    """Turn a side into an array of float64, complex, integers (as Python objects where they are large) or text."""
    array = np.asarray(side)
    kind = array.dtype.kind
    if array.ndim == 0 and kind == "b":
        raise TypeError(f"{label}: compare two quantities, not a truth value; pass both sides of the comparison")
    if kind in "SU":  # as Python objects: numpy's own text drops trailing NULs
        return np.asarray(side, dtype=object)
    if kind == "b":
        return array.astype(np.int64)
    if kind == "f" and array.dtype.itemsize < 8:
        return array.astype(np.float64)
    if kind in "Of" and not isinstance(side, np.ndarray):
        exact = np.asarray(side, dtype=object)
        if all(type(value) is int for value in exact.flat):  # too large for int64, or about to be rounded
            return exact
    if kind not in "iufc":
        raise TypeError(f"{label}: cannot compare a {type(side).__name__}; pass numbers, arrays, strings or bytes")
    return array


def to_numpy(value: Any) -> Any:
    """Convert torch tensors, lists of them, and bytes to arrays; leave everything else alone."""
    if hasattr(value, "detach"):  # a torch tensor, recognised without importing torch
        value = value.detach().cpu()
        if str(value.layout) != "torch.strided":
            value = value.to_dense()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        return value.resolve_conj().resolve_neg().numpy()
    if isinstance(value, (list, tuple)) and any(hasattr(item, "detach") for item in value):
        return np.array([to_numpy(item) for item in value])
    if isinstance(value, (bytes, bytearray)):
        return np.frombuffer(value, np.uint8)
    return value


def _same_memory(a: Any, b: Any) -> bool:
    """Whether both are one object, or one piece of memory seen in the same way. Plain numbers and text may be."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a is b and not isinstance(a, (int, float, complex, str, np.generic))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides


def _is_text(array: np.ndarray) -> bool:
    return array.dtype == object and not all(type(value) is int for value in array.flat)


def _excess(
    a: np.ndarray, b: np.ndarray, tol: Any, rtol: float, relation: Relation, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """How far each entry breaks the relation, and how far it may."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    size = np.abs(b.astype(complex) if b.dtype.kind == "c" else b.astype(float))
    allowed = np.asarray(to_numpy(tol), dtype=float) + rtol * np.where(np.isfinite(size), size, 0.0)
    if not (np.isfinite(allowed) & (allowed >= 0)).all():
        raise ValueError(f"{label}: the tolerance must be finite and not negative, got {tol}")
    if np.broadcast_shapes(allowed.shape, shape) != shape:
        raise ValueError(f"{label}: the tolerance has shape {np.shape(tol)}, the sides have {shape}; make them equal")
    if "c" in (a.dtype.kind, b.dtype.kind):
        if relation != "=":
            raise TypeError(f"{label}: complex numbers have no order, relation {relation!r} does not apply")
        difference = np.where(a == b, 0.0, a - b)
    elif any(side.dtype.kind in "iuO" and max(-int(side.min()), int(side.max())) >= 2**53 for side in (a, b)):
        # Beyond float64: Python's own numbers are exact and never wrap around.
        exact = (np.asarray(side.astype(object)) for side in (a, b))
        difference = np.vectorize(_exact_difference, otypes=[float])(*exact)
    else:
        with np.errstate(invalid="ignore"):  # equal infinities count as equal
            difference = np.where(a == b, 0.0, a.astype(float) - b.astype(float))
    excess = {"=": np.abs(difference), "<=": difference, ">=": -difference}[relation]
    excess, allowed = np.broadcast_arrays(excess, allowed)
    return excess, allowed


def _exact_difference(x: int | float, y: int | float) -> float:
    if x == y:
        return 0.0
    if all(isinstance(value, int) or np.isfinite(value) for value in (x, y)):
        return float(Fraction(x) - Fraction(y))
    return float(x) - float(y)


def _compare_exactly(a: np.ndarray, b: np.ndarray, label: str, relation: Relation) -> None:
    if relation != "=":
        raise TypeError(f'{label}: text can only be compared with relation "="')
    if a.dtype.kind != b.dtype.kind:
        raise TypeError(f"{label}: one side is text, the other is not")
    different = np.asarray(a != b)
    if different.any():
        at = np.argmax(different)
        x, y = (np.broadcast_to(array, different.shape).flat[at] for array in (a, b))
        raise CheckFailed(f"{label}: {x!r} ≠ {y!r}{_index(at, different.shape)}")


def _index(flat: int, shape: tuple[int, ...]) -> str:
    if not shape:
        return ""
    index = tuple(int(i) for i in np.unravel_index(flat, shape))
    return f" at index {index[0] if len(index) == 1 else index}"


def _digits(value: Any) -> str:
    whole = isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else f"{value:.10g}"


def _precision(tol: Any, rtol: float, relation: Relation) -> str:
    largest = float(np.max(to_numpy(tol)))
    parts = ([f"{largest:.1g}"] if largest else []) + ([f"{rtol:.1g} relative"] if rtol else [])
    return "within " + " + ".join(parts) if parts else "exactly" if relation == "=" else "holds"

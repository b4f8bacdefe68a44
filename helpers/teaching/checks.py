"""`check`: the sentence under every numbered equation that a machine has verified."""

from __future__ import annotations

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
    """Compare both sides of equation (`number`), computed in two different ways, and say so.

    Parameters
    ----------
    number
        The equation's number, the n of ``\\tag{n}`` in the text above the cell.
    claim
        What is claimed, in a few words; it is printed.
    left, right
        The two sides: numbers, arrays or tensors of one shape (a plain number stands for an array
        filled with it), or strings or bytes, which must be equal.
    tol
        Largest allowed absolute difference, a number or an array (for example a confidence band);
        1e-12 if neither it nor `rtol` is given.
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
    if left is right and not isinstance(left, (int, float, str, bytes)):
        raise ValueError(f"{label}: both sides are the same object, so the check could never fail")
    if isinstance(left, (bool, np.bool_)) or isinstance(right, (bool, np.bool_)):
        raise TypeError(f"{label}: compare two quantities, not a truth value; pass both sides of the comparison")
    if relation not in ("=", "<=", ">="):
        raise ValueError(f'{label}: relation must be "=", "<=" or ">=", not {relation!r}')
    a, b = (_as_array(side, label) for side in (left, right))
    if a.ndim and b.ndim and a.shape != b.shape:
        raise ValueError(f"{label}: the left side has shape {a.shape}, the right side {b.shape}; make them equal")
    if a.size == 0 or b.size == 0:
        raise CheckFailed(f"{label}: there is nothing to compare, a side is empty")

    if "O" in (a.dtype.kind, b.dtype.kind):
        _compare_exactly(a, b, label, relation)
        print(f"✓ {label}   [exactly]")
        return

    for side, array in (("left", a), ("right", b)):
        if np.isnan(array).any():
            where = _first_index(np.isnan(array))
            raise CheckFailed(f"{label}: the {side} side is NaN{where}")
    if tol is None:
        tol = 0.0 if rtol else 1e-12
    excess, allowed = _excess(a, b, tol, rtol, relation)
    if (excess > allowed).any():
        worst = np.argmax(excess - allowed)
        shape = excess.shape
        x, y = (np.broadcast_to(array, shape).flat[worst] for array in (a, b))
        sign = {"=": "≠", "<=": ">", ">=": "<"}[relation]
        raise CheckFailed(
            f"{label}: largest difference {excess.flat[worst]:.3g}{_index(worst, shape)}: "
            f"{x:.10g} {sign} {y:.10g} (allowed {allowed.flat[worst]:.3g})"
        )
    print(f"✓ {label}   [{_precision(tol, rtol, relation)}]")


def _as_array(side: Any, label: str) -> np.ndarray:
    if hasattr(side, "detach"):  # a torch tensor, recognised without importing torch
        side = side.detach().cpu()
        if str(side.dtype) == "torch.bfloat16":  # numpy has no such type
            side = side.float()
        side = side.numpy()
    if isinstance(side, (bytes, bytearray)):
        side = np.frombuffer(side, np.uint8)
    array = np.asarray(side)
    if array.dtype.kind in "SU":  # as Python objects: numpy's own text drops trailing NULs
        array = np.asarray(side, dtype=object)
    elif array.dtype.kind == "b":
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize < 8:
        array = array.astype(np.float64)
    elif array.dtype.kind not in "iufc":
        raise TypeError(f"{label}: cannot compare a {type(side).__name__}; pass numbers, arrays, strings or bytes")
    return array


def _excess(a: np.ndarray, b: np.ndarray, tol: Any, rtol: float, relation: Relation) -> tuple[np.ndarray, np.ndarray]:
    """How far each entry breaks the relation, and how far it may."""
    allowed = np.asarray(tol, dtype=float) + (rtol * np.abs(b) if rtol else 0.0)
    if not (np.isfinite(allowed) & (allowed >= 0)).all():
        raise ValueError(f"the tolerance must be finite and not negative, got {tol}")
    if "c" in (a.dtype.kind, b.dtype.kind) and relation != "=":
        raise TypeError(f"complex numbers have no order: relation {relation!r} does not apply")
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":  # difference of large integers without rounding
        difference = np.asarray(a.astype(object) - b.astype(object)).astype(float)
    else:
        with np.errstate(invalid="ignore"):  # equal infinities count as equal
            difference = np.where(a == b, 0.0, a - b)
    excess = {"=": np.abs(difference), "<=": difference, ">=": -difference}[relation]
    excess, allowed = np.broadcast_arrays(excess, allowed)
    return excess, allowed


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


def _first_index(mask: np.ndarray) -> str:
    return _index(int(np.argmax(mask)), mask.shape)


def _precision(tol: Any, rtol: float, relation: Relation) -> str:
    largest = float(np.max(tol))
    parts = ([f"{largest:.1g}"] if largest else []) + ([f"{rtol:.1g} relative"] if rtol else [])
    return "within " + " + ".join(parts) if parts else "exactly" if relation == "=" else "holds"

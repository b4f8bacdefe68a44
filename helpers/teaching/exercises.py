"""Exercises: a stub, a checker that names what is off, and wrong answers that have to be rejected."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from helpers.teaching.checks import to_numpy

Answer = Any


class Exercise:
    """One exercise. Calling it with the reader's answer prints what to think of it; it never raises for a wrong one.

    Parameters
    ----------
    task
        What is asked for, in a few words; printed with the verdict.
    expected
        The right answer: a number, an array, or a function that computes it. Let it reach the answer by
        another way than the derivation (brute force, simulation, a library), so that it is worth something.
    cases
        For a function: the tuples of arguments on which the reader's function has to agree with `expected`.
    wrong
        Plausible wrong answers, ``{hint: answer}``. Who gives one is shown its hint; a test makes sure that
        each of them is rejected with that very hint.
    hint
        Shown for every other wrong answer.
    tol
        Largest allowed absolute difference.
    """

    def __init__(
        self,
        task: str,
        expected: Answer,
        *,
        cases: Sequence[tuple] = (),
        wrong: Mapping[str, Answer] | None = None,
        hint: str = "",
        tol: float = 1e-9,
    ) -> None:
        if callable(expected) != bool(cases):
            raise ValueError(f"exercise {task!r}: give `cases` exactly when the answer is a function")
        self.task, self.expected, self.cases = task, expected, tuple(cases)
        self.wrong, self.hint, self.tol = dict(wrong or {}), hint, tol

    def __call__(self, answer: Answer) -> None:
        """Print the verdict on `answer`."""
        print(self.verdict(answer))

    def verdict(self, answer: Answer) -> str:
        """Judge `answer`: "✓ …", "not attempted yet …", or "✗ …" with a hint."""
        if answer is ... or answer is None:
            return self._not_attempted()
        if callable(self.expected):
            return self._judge_function(answer)
        value = _numbers(answer)
        if value is None:
            return self._reject(f"expected a number, got {type(answer).__name__}: {_short(answer)}")
        if self._same(value, self.expected):
            return self._accept()
        if np.isnan(value).any():
            return self._reject("the answer is NaN")
        return self._reject(self._hint_for(lambda known: self._same(value, known)))

    def _judge_function(self, answer: Answer) -> str:
        if not callable(answer):
            return self._reject(f"expected a function, got {type(answer).__name__}: {_short(answer)}")
        if complaint := self._signature_complaint(answer):
            return self._reject(complaint)
        results = []
        for case in self.cases:
            try:
                result = answer(*copy.deepcopy(case))  # a copy: it may change what it is given
            except NotImplementedError:
                return self._not_attempted()
            except (Exception, SystemExit) as error:  # the reader's code may raise anything; say what and where
                return self._reject(f"{_call(answer, case)} raises {type(error).__name__}: {error}")
            if result is None or result is ...:
                if not results:
                    return self._not_attempted()
                return self._reject(f"{_call(answer, case)} returns nothing; is a `return` missing on one path?")
            results.append(result)
        for case, result in zip(self.cases, results, strict=True):
            right = self.expected(*copy.deepcopy(case))
            if not self._same(result, right):
                hint = self._hint_for(lambda wrong: self._agrees(results, wrong))
                return self._reject(f"{_call(answer, case)} gives {_short(result)}, expected {_short(right)}. {hint}")
        return self._accept()

    def _agrees(self, results: Sequence[Any], wrong: Callable) -> bool:
        """Whether a known wrong function gives these results."""
        try:
            known = [wrong(*copy.deepcopy(case)) for case in self.cases]
        except Exception:  # a wrong answer may well be one that fails
            return False
        return all(self._same(a, b) for a, b in zip(results, known, strict=True))

    def _signature_complaint(self, answer: Callable) -> str:
        names = list(inspect.signature(self.expected).parameters)
        try:
            signature = inspect.signature(answer)
            signature.bind(*names)
        except ValueError:  # a builtin without a signature: calling it will tell
            return ""
        except TypeError:
            return f"the function has to take ({', '.join(names)}); yours takes ({', '.join(signature.parameters)})"
        return ""

    def _same(self, answer: Any, right: Any) -> bool:
        a, b = _numbers(answer), _numbers(right)
        if a is None or b is None or a.shape != b.shape:
            return False
        with np.errstate(invalid="ignore"):
            return bool(np.all((a == b) | (np.abs(a - b) <= self.tol)))

    def _hint_for(self, gives: Callable[[Answer], bool]) -> str:
        return next((hint for hint, known in self.wrong.items() if gives(known)), self.hint)

    def _accept(self) -> str:
        return f"✓ {self.task}"

    def _not_attempted(self) -> str:
        missing = "; or a `return` is missing" if callable(self.expected) else ""
        return f"not attempted yet: {self.task}{missing}"

    def _reject(self, reason: str) -> str:
        return f"✗ {self.task}: {reason}".rstrip()


def _numbers(value: Any) -> np.ndarray | None:
    """Turn an answer into an array of float64 or complex; None if it is something else."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        array = np.asarray(to_numpy(value))
        return array.astype(complex if array.dtype.kind == "c" else float)
    except (TypeError, ValueError, OverflowError):
        return None


def _short(value: Any) -> str:
    array = _numbers(value)
    if array is None:
        return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    if array.size > 6:
        return f"<{array.size} values>"
    if array.ndim:
        return "[" + ", ".join(map(_short, array)) + "]"
    return f"{array[()]:.6g}"


def _call(function: Callable, case: tuple) -> str:
    name = getattr(function, "__name__", "your function")
    return f"{name}({', '.join(_short(value) for value in case)})"

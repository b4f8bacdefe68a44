"""Every exercise of every notebook: the stub is not attempted, the solution passes, wrong answers get their hints."""

from __future__ import annotations

import pytest
import torch
from collection import NOTEBOOKS, exercise_setup, exercises, read

CASES = [(path, number) for path in NOTEBOOKS for number in range(len(exercises(read(path))))]

every_exercise = pytest.mark.parametrize("path, number", CASES, ids=[f"{p.stem}-{n + 1}" for p, n in CASES])


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """A notebook's first cell may change torch's default type; the next test must not notice."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def run(path, number, answer=""):
    """Run an exercise's stub, or `answer` in its place; return the namespace and the checker."""
    notebook = read(path)
    exercise = exercises(notebook)[number]
    names = {"__name__": "__main__"}
    exec(exercise_setup(notebook), names)
    if answer == "stub":
        exec(exercise.stub, names)
    elif answer == "solution":
        exec(exercise.solution + f"\n{exercise.stub.splitlines()[-1]}", names)
    return names[exercise.checker]


def test_there_are_exercises():
    assert len(CASES) >= 5


@every_exercise
def test_the_stub_is_not_attempted(path, number, capsys):
    run(path, number, "stub")
    assert capsys.readouterr().out.startswith("not attempted yet: ")


@every_exercise
def test_the_solution_passes(path, number, capsys):
    run(path, number, "solution")
    assert capsys.readouterr().out.startswith("✓ ")


@every_exercise
def test_each_plausible_wrong_answer_is_rejected_with_its_hint(path, number):
    checker = run(path, number)
    assert len(checker.wrong) >= 2, "list the wrong answers that a reader is likely to give"
    for hint, wrong in checker.wrong.items():
        verdict = checker.verdict(wrong)
        assert verdict.startswith("✗ ") and verdict.endswith(hint), verdict


@every_exercise
def test_any_other_wrong_answer_is_rejected_with_the_general_hint(path, number):
    checker = run(path, number)
    strange = (lambda *arguments: 12345.678) if callable(checker.expected) else 12345.678
    verdict = checker.verdict(strange)
    assert verdict.startswith("✗ ") and checker.hint and verdict.endswith(checker.hint), verdict

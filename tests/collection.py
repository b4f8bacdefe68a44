"""The notebooks as the tests see them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOPICS = [path for path in NOTEBOOKS if not path.name.startswith("00")]


def read(path: Path) -> nbformat.NotebookNode:
    """Parse one notebook."""
    return nbformat.read(path, as_version=4)


def calls(source: str, name: str) -> list[ast.Call]:
    """All calls of the function `name` in a code cell."""
    nodes = ast.walk(ast.parse(source))
    return [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def tags(markdown: str) -> list[int]:
    """Numbers of the equations in a Markdown cell."""
    return [int(number) for number in re.findall(r"\\tag\{(\d+)\}", markdown)]


def checked(source: str) -> list[int]:
    """Numbers of the equations that a code cell checks."""
    return [ast.literal_eval(call.args[0]) for call in calls(source, "check")]


def equation_problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the pairing of equations and checks; every equation is checked in the next code cell."""
    problems, waiting, numbers = [], [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            waiting += tags(cell.source)
            numbers += tags(cell.source)
        elif cell.cell_type == "code":
            done = checked(cell.source)
            if sorted(set(done)) != waiting:
                problems.append(f"cell {cell.id} checks {done}, the text before it numbers {waiting}")
            for number in done:
                if f"✓ ({number}) " not in "".join(output.get("text", "") for output in cell.outputs):
                    problems.append(f"cell {cell.id} does not print ✓ ({number})")
            waiting = []
    if waiting:
        problems.append(f"equations {waiting} at the end have no check")
    if numbers != list(range(1, len(numbers) + 1)):
        problems.append(f"equations are numbered {numbers}")
    return problems


@dataclass
class ExerciseCells:
    """One exercise as it stands in a notebook."""

    stub: str
    checker: str  # name of the Exercise object that the stub calls
    solution: str  # code from the folded solution


def exercises(notebook: nbformat.NotebookNode) -> list[ExerciseCells]:
    """All stubs with the solutions that follow them."""
    found = []
    cells = notebook.cells
    for here, after in pairwise(cells):
        if "exercise" in here.metadata.get("tags", []):
            solution = re.search(r"<details>.*?Solution.*?```python\n(.*?)```.*?</details>", after.source, re.DOTALL)
            last = ast.parse(here.source).body[-1]
            assert isinstance(last, ast.Expr) and isinstance(last.value, ast.Call), f"{here.id} must end in its checker"
            assert solution, f"no folded solution with code right after {here.id}"
            found.append(ExerciseCells(here.source, last.value.func.id, solution[1]))
    return found


def exercise_setup(notebook: nbformat.NotebookNode) -> str:
    """All code that an exercise may rely on: the first cell's imports and the checkers."""
    wanted = ("setup", "exercise-checkers")
    return "\n\n".join(c.source for c in notebook.cells if set(wanted) & set(c.metadata.get("tags", [])))


def skip_unless_pinned(*packages):
    """Skip where another version is installed than the one that made what is stored."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for package in packages:
        if metadata.version(package).split("+")[0] != pins[package]:
            pytest.skip(f"compared only with the version of {package} in constraints.txt")

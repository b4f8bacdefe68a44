"""That the run of the notebooks goes red where nbval alone would stay green."""

from __future__ import annotations

import subprocess
import sys

import nbformat
import pytest
from collection import ROOT
from nbformat.v4 import new_code_cell, new_notebook

from helpers.authoring import build

SETUP = "from helpers.teaching import explore, set_style, show, slider\nimport matplotlib.pyplot as plt\nset_style()"
PICTURE = """figure, ax = plt.subplots(figsize=(4, 2))
ax.plot([0, 1])
show(figure, "A line that rises from zero to its height, for a test of the tests.")"""
WIDGET = """heights = [1, 2, 3]
def frame(ax):
    ax.set(xlim=(0, 1), ylim=(0, 4))
def draw(ax, x):
    ax.plot([0, 1], [0, heights[x]])
explore(draw, frame=frame, x=slider(0, 2, 1), alt="A line that rises to one of three heights.")"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What pytest says of a notebook of which five cells are not as stored."""
    path = tmp_path_factory.mktemp("notebook") / "spoilt.ipynb"
    sources = [SETUP, PICTURE, PICTURE, PICTURE, "print(1)", WIDGET, "1"]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    cells = build.clean(build.execute(notebook, path.parent)).cells
    cells[2].outputs[0].data["image/png"] = cells[5].outputs[0].data["image/png"]
    del cells[3].outputs[0].data["image/png"]
    cells[4].outputs[0].text = "2\n"
    cells[6].source = "heights[1] = 3; 1"  # the widget's data; a build would refuse it
    path.write_text(nbformat.writes(new_notebook(cells=cells)), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-c", "pyproject.toml", "-p", "conftest", "-p", "no:cacheprovider"]
    return subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("cell, passes", list(enumerate([True, True, False, False, False, True, False])))
def test_the_cells_that_are_not_as_stored_are_red_and_no_others(report, cell, passes):
    assert f"::Cell {cell} {'PASSED' if passes else 'FAILED'}" in report


@pytest.mark.parametrize(
    "says",
    [
        "the stored picture is 800×340, the fresh one 400×200",
        "0 pictures stored, 1 drawn",
        "Cell outputs differ",
        "draws another picture than when it was built",
    ],
)
def test_it_says_why(report, says):
    assert says in report

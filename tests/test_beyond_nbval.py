"""That the run of the notebooks goes red where nbval alone would stay green."""

from __future__ import annotations

import base64
import re
import subprocess
import sys

import nbformat
import pytest
from collection import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

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


def broken(png):
    """A PNG with one wrong byte, in the checksum of its pixels: it looks as before."""
    data = bytearray(base64.b64decode(png))
    data[-13] ^= 1  # after the checksum comes the end, 12 bytes
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What pytest says of a notebook of which eight cells are not as stored, and of one written by something else."""
    path = tmp_path_factory.mktemp("notebook") / "spoilt.ipynb"
    around = f"print(1)\n{PICTURE}\nprint(2)"
    sources = [SETUP, around, PICTURE, PICTURE, "print(1)", WIDGET, PICTURE, PICTURE, WIDGET, "1", "1"]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    cells = build.clean(build.execute(notebook, path.parent)).cells
    cells[2].outputs[0].data["image/png"] = cells[5].outputs[0].data["image/png"]
    del cells[3].outputs[0].data["image/png"]
    cells[4].outputs[0].text = "2\n"
    cells[6].outputs[0].data["image/png"] = broken(cells[6].outputs[0].data["image/png"])
    cells[7].outputs[0].metadata["image/png"]["alt"] += " More."
    cells[8].outputs[0].metadata["image/png"]["alt"] = "A line that rises."
    cells[9].execution_count = cells[9].outputs[0].execution_count = 3
    cells[10].source = "heights[1] = 3; 1"  # the widget's data; a build would refuse it
    path.write_text(build.written(build.strip(new_notebook(cells=cells))), encoding="utf-8")
    other = path.with_name("other.ipynb")
    cells = [new_code_cell(str(n), execution_count=n) for n in (1, 2)]
    for n, cell in enumerate(cells, 1):
        cell.outputs = [new_output("execute_result", {"text/plain": str(n)}, execution_count=n)]
    other.write_text(nbformat.writes(new_notebook(cells=cells, metadata={"widgets": {}})), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-c", "pyproject.toml", "-p", "conftest", "-p", "no:cacheprovider"]
    return subprocess.run([*command, str(path), str(other)], cwd=ROOT, capture_output=True, text=True).stdout


SPOILT = [True, True, False, False, False, True, False, False, False, False, False]
OTHER = [True, False]


@pytest.mark.parametrize("place, passes", list(enumerate(SPOILT + OTHER)))
def test_the_cells_that_are_not_as_stored_are_red_and_no_others(report, place, passes):
    results = re.findall(r"::Cell (\d+) (PASSED|FAILED)", report)
    assert len(results) == len(SPOILT + OTHER)
    cell = place if place < len(SPOILT) else place - len(SPOILT)
    assert results[place] == (str(cell), "PASSED" if passes else "FAILED")


@pytest.mark.parametrize(
    "says",
    [
        "the stored picture is 800×340, the fresh one 400×200",
        "0 pictures stored, 1 drawn",
        "Cell outputs differ",
        "the stored picture is broken: broken PNG file",
        "a rebuild would store another metadata:",
        "a rebuild would store another execution_count:",
        "draws another picture than when it was built",
        "a rebuild would write other bytes",
    ],
)
def test_it_says_why(report, says):
    assert says in report

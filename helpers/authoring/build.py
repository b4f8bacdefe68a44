"""Execute notebooks in a fresh kernel and store them without noise: a rebuild with nothing new changes no byte."""

from __future__ import annotations

import base64
import copy
import functools
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
VOLATILE = "nbval-ignore-output"  # the tag of a cell whose output depends on the machine
LARGEST_NOTEBOOK = 1_000_000  # bytes

# Two pictures are the same when at most this many pixels differ by more than this many of 255 levels. A palette
# and another processor's last digit stay far below it; a moved marker, a digit or a line far above.
DIFFERENT_LEVELS = 64
DIFFERENT_PIXELS = 25


DRIVE_AGAIN = """
from helpers.teaching.widgets import EXPLORERS
for _explorer in list(EXPLORERS.values()):
    _explorer.require_unchanged()
    _explorer.drive(quick={quick})
"""


class BuildError(Exception):
    """A notebook cannot be stored as it is."""


@dataclass
class Built:
    """What a build of one notebook gave."""

    path: Path
    text: str
    changed: bool
    seconds: float

    def __str__(self) -> str:
        state = "changed" if self.changed else "unchanged"
        return f"{self.path.name}: {self.seconds:.1f} s, {len(self.text.encode()) / 1000:.0f} kB, {state}"


def notebooks() -> list[Path]:
    """All notebooks of the collection, in order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def build(path: Path, *, check: bool = False, fresh: bool = False) -> Built:
    """Execute the notebook at `path`, clean and shrink it, and write it back if anything is different.

    Parameters
    ----------
    check
        Only say whether the stored notebook is up to date; write nothing.
    fresh
        Store every output anew, also where the stored one says the same or depends on the machine.

    Raises
    ------
    BuildError
        A cell fails, or the result is larger than 1 MB.
    """
    start = time.perf_counter()
    before = path.read_bytes()
    stored = nbformat.reads(before.decode(), as_version=4)
    executed = clean(execute(stored, path.parent))
    if not fresh:
        keep_what_is_the_same(stored, executed)
    text = written(executed)
    if len(text.encode()) > LARGEST_NOTEBOOK:
        raise BuildError(f"{path.name} would have {len(text.encode())} bytes; {LARGEST_NOTEBOOK} is the limit")
    changed = text.encode() != before
    if changed and not check:
        path.write_bytes(text.encode())
    return Built(path, text, changed, time.perf_counter() - start)


def written(notebook: NotebookNode) -> str:
    """Return the text of the file in which `notebook` is stored."""
    return nbformat.writes(notebook) + "\n"


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells of a copy of `notebook` in a fresh kernel whose working directory is `folder`.

    In the end all widgets are driven and have to draw what they drew when they were built: a widget may work at
    its cell and still break later, when other cells change what it uses.

    Raises
    ------
    BuildError
        A cell fails, or a widget does not draw what it drew.
    """
    fresh = copy.deepcopy(notebook)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread: results and times do not depend on the machine
    client = NotebookClient(
        fresh,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    fresh.cells.append(nbformat.v4.new_code_cell(DRIVE_AGAIN.format(quick=False)))
    try:
        client.execute(env=os.environ | {"DRIVE_WIDGETS": "0"})  # at the end only; nbval drives them at their cells
    except CellExecutionError as error:
        raise BuildError(str(error)) from None
    fresh.cells.pop()
    return fresh


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove what changes from run to run or only makes the file larger. Works in place, returns its argument."""
    for cell in strip(notebook).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink(output.data["image/png"])
    return notebook


def strip(notebook: NotebookNode) -> NotebookNode:
    """Do what `clean` does except for the pictures, which take its time. Works in place, returns its argument."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("trusted", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = _join_streams(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "error":
                raise BuildError(f"cell {cell.id} failed: {output.ename}: {output.evalue}")
            # Without its state a front end shows an error instead of the picture.
            output.get("data", {}).pop(WIDGET_VIEW, None)
    return notebook


def _join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of one stream: where the kernel cuts it depends on timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def shrink(png: str) -> str:
    """Re-encode a base64 PNG with a palette of 256 colours where that is smaller."""
    best = base64.b64decode(png)
    image = Image.open(io.BytesIO(best)).convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    for candidate in (image, palette):
        buffer = io.BytesIO()
        candidate.save(buffer, "PNG", optimize=True)
        if len(buffer.getvalue()) < len(best):
            best = buffer.getvalue()
    return base64.b64encode(best).decode()


def keep_what_is_the_same(stored: NotebookNode, fresh: NotebookNode) -> None:
    """Put stored bytes back where the fresh output says the same: equal pictures, and machine-dependent text."""
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        if old.cell_type != "code":
            continue
        if VOLATILE in old.metadata.get("tags", []):
            if [o.output_type for o in old.outputs] == [o.output_type for o in new.outputs]:
                new.outputs = copy.deepcopy(old.outputs)
                for output in new.outputs:
                    if "execution_count" in output:
                        output.execution_count = new.execution_count
            continue
        for before, after in zip(old.outputs, new.outputs, strict=False):
            a, b = (output.get("data", {}).get("image/png") for output in (before, after))
            if a and b and not picture_difference(a, b):
                after.data["image/png"] = a


@functools.lru_cache(maxsize=16)  # the tests ask twice: for all pictures of a cell, then for what a rebuild keeps
def picture_difference(stored: str, fresh: str) -> str:
    """Say how two base64 PNGs differ to the eye; empty when they do not."""
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), int) for png in (stored, fresh))
    if a.shape != b.shape:
        return f"the stored picture is {a.shape[1]}×{a.shape[0]}, the fresh one {b.shape[1]}×{b.shape[0]}"
    different = (np.abs(a - b).max(axis=2) > DIFFERENT_LEVELS).sum()
    return f"{different} pixels differ" if different > DIFFERENT_PIXELS else ""

"""What nbval leaves out, done in its own run.

Pictures are compared, and all else that a rebuild would store, byte by byte; in the end the widgets are driven once
more, and the time is looked at.
"""

from __future__ import annotations

import base64
import copy
import io
import time

import nbformat
import pytest
from collection import skip_unless_pinned
from nbval.plugin import IPyNbCell, coalesce_streams
from PIL import Image

from helpers.authoring.build import DRIVE_AGAIN, VOLATILE, keep_what_is_the_same, picture_difference, strip, written

SECONDS = 60  # the promise is 15 s on an idle machine; here every widget is driven twice, and another process works

_started: dict[object, float] = {}
_stored: dict[object, list[nbformat.NotebookNode]] = {}  # the code cells of the file


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Let nbval run a cell and compare its text; then compare its pictures, and finish the notebook after the last."""
    _started.setdefault(item.parent, time.perf_counter())
    result = yield
    if isinstance(item, IPyNbCell):
        if VOLATILE not in item.cell.metadata.get("tags", []):
            _compare_pictures(item)
        _compare_what_a_rebuild_stores(item)
        cells = [other for other in item.session.items if other.parent is item.parent]
        if item is cells[-1] and len(cells) > 1:
            _compare_file(item)
            _drive_again(item)
            seconds = time.perf_counter() - _started[item.parent]
            assert seconds < SECONDS, f"the notebook took {seconds:.0f} s"
    return result


def _compare_pictures(item: IPyNbCell) -> None:
    before, after = (
        [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        for outputs in (item.cell.outputs, item.test_outputs)
    )
    assert len(before) == len(after), f"{len(before)} pictures stored, {len(after)} drawn"
    if before:
        skip_unless_pinned("matplotlib", "numpy")
    for stored, fresh in zip(before, after, strict=True):
        _require_sound(base64.b64decode(stored))
        assert not (difference := picture_difference(stored, fresh)), difference


def _require_sound(png: bytes) -> None:
    """Raise if a byte is not as it was encoded: not every such picture looks different."""
    assert png.endswith(b"IEND\xaeB`\x82"), "bytes after the end of the stored picture"
    try:
        Image.open(io.BytesIO(png)).verify()  # every part has its checksum
    except (SyntaxError, OSError, ValueError) as error:
        raise AssertionError(f"the stored picture is broken: {error}") from None


def _compare_what_a_rebuild_stores(item: IPyNbCell) -> None:
    """Send what the cell gave just now through the build: it has to store what is stored, alt texts included."""
    if item.parent not in _stored:  # read anew: nbval changes its own copy when it compares
        cells = nbformat.read(item.parent.path, as_version=4).cells
        _stored[item.parent] = [cell for cell in cells if cell.cell_type == "code"]
    stored = _stored[item.parent][item.cell_num]
    stored.outputs = coalesce_streams(stored.outputs)  # nbval has joined what the cell printed around a picture
    fresh = copy.deepcopy(stored)
    fresh.outputs, fresh.execution_count = copy.deepcopy(item.test_outputs), item.cell_num + 1
    for output in fresh.outputs:
        if "execution_count" in output:  # nbval's kernel does not count
            output.execution_count = fresh.execution_count
    notebook = strip(nbformat.v4.new_notebook(cells=[fresh]))
    keep_what_is_the_same(nbformat.v4.new_notebook(cells=[stored]), notebook)
    for before, after in zip(stored.outputs, fresh.outputs, strict=False):
        before, after = ({**output, **output.get("data", {})} for output in (before, after))
        for part in sorted({*before, *after} - {"data"}):
            a, b = before.get(part), after.get(part)
            says = "" if part == "image/png" else f":\n{b}\ninstead of\n{a}"
            assert a == b, f"a rebuild would store another {part}{says}"
    assert stored == fresh, "a rebuild would store other outputs or tags of this cell"


def _compare_file(item: IPyNbCell) -> None:
    """Outside of the outputs, too, the file has to be what a build writes, to the byte."""
    path = item.parent.path
    before = path.read_bytes()
    text = written(strip(nbformat.reads(before.decode(), as_version=4)))
    assert text.encode() == before, "a rebuild would write other bytes: run `make build`"


def _drive_again(item: IPyNbCell) -> None:
    """Drive all widgets: each has to draw what it drew when it was built, whatever later cells did."""
    client = item.parent.kernel.kc
    code = DRIVE_AGAIN.format(quick=True)  # in full, each was driven at its cell
    reply = client.execute_interactive(
        code, store_history=False, allow_stdin=False, timeout=120, output_hook=lambda message: None
    )["content"]
    assert reply["status"] == "ok", f"widgets driven once more: {reply.get('ename')}: {reply.get('evalue')}"

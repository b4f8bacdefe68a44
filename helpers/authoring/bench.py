"""Time one step of every slider in a live kernel, as the front end sees it: from the message to the kernel's idle."""

from __future__ import annotations

import json
import queue
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

STEPS = 30
LIMIT_MS = 50.0

# Runs in the kernel after the notebook: what there is to move, and what one plain render costs here and now.
_SURVEY = f"""
import io as _io, json as _json, time as _time
import numpy as _np
from helpers.teaching.widgets import EXPLORERS as _EXPLORERS
def _positions(control):  # what the front end may send: an index into the options, or a value
    if hasattr(control, "options"):
        return "index", _moves(range(len(control.options)), control.index), control.index
    if not hasattr(control, "min"):
        return "value", _moves([True, False], control.value), control.value
    ends = _np.linspace(control.min, control.max, {STEPS})
    values = control.base ** ends if hasattr(control, "base") else ends
    return "value", _moves([type(control.value)(v) for v in values], control.value), control.value
def _moves(values, start):  # each differs from the one before it: nothing is drawn, in no time, when nothing moves
    values = list(dict.fromkeys(values))
    return values[1:] + values[:1] if values[0] == start else values
def _plain(explorer, repeats=7):
    times = []
    for _ in range(repeats):
        start = _time.perf_counter()
        explorer.figure.savefig(_io.BytesIO(), format="png")
        times.append(1e3 * (_time.perf_counter() - start))
    return float(_np.median(times))
print(_json.dumps([
    dict(name=e.name, plain=_plain(e), controls=[
        dict(zip(("name", "model", "key", "values", "start"), (n, c.model_id, *_positions(c))))
        for n, c in e.controls.items()])
    for _, e in sorted(_EXPLORERS.items())]))
"""


@dataclass
class Timing:
    """Milliseconds of one control's steps, and of one plain render of the same figure in the same kernel."""

    notebook: str
    widget: str
    control: str
    median: float
    slowest: float
    plain: float

    def __str__(self) -> str:
        place = f"{self.notebook:32} {self.widget:24} {self.control:14}"
        return f"{place} {self.median:7.1f} {self.slowest:7.1f} {self.plain:7.1f} {self.median / self.plain:6.2f}"


HEADER = f"{'notebook':32} {'widget':24} {'control':14} {'median':>7} {'slowest':>7} {'plain':>7} {'ratio':>6}   (ms)"


def bench(path: Path) -> list[Timing]:
    """Run the notebook at `path` in a live kernel and step through every control of every widget."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(path.parent))
    try:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                _execute(client, cell.source)
        timings = []
        for widget in json.loads(_execute(client, _SURVEY)):
            for control in widget["controls"]:
                times = [_move(client, control["model"], {control["key"]: value}) for value in control["values"]]
                _move(client, control["model"], {control["key"]: control["start"]})
                median = statistics.median(times)
                timings.append(Timing(path.stem, widget["name"], control["name"], median, max(times), widget["plain"]))
        return timings
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _execute(client: BlockingKernelClient, source: str) -> str:
    printed: list[str] = []

    def collect(message: dict) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
        if message["msg_type"] == "error":
            raise RuntimeError(f"{message['content']['ename']}: {message['content']['evalue']}")

    client.execute_interactive(source, output_hook=collect, timeout=300)
    return "".join(printed)


def _move(client: BlockingKernelClient, model: str, state: dict) -> float:
    """Send what the front end sends when a control moves; return the milliseconds until the kernel is idle again."""
    content = {"comm_id": model, "data": {"method": "update", "state": state, "buffer_paths": []}}
    message = client.session.msg("comm_msg", content)
    start = time.perf_counter()
    client.shell_channel.send(message)
    while True:
        try:
            reply = client.get_iopub_msg(timeout=30)
        except queue.Empty:
            raise RuntimeError(f"the kernel did not answer within 30 s when a control was set to {state}") from None
        mine = reply["parent_header"].get("msg_id") == message["header"]["msg_id"]
        if mine and reply["msg_type"] == "status" and reply["content"]["execution_state"] == "idle":
            return 1e3 * (time.perf_counter() - start)

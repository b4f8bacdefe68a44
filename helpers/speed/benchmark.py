"""Measure every rival over the lengths: first whether it is right, then time and memory, within a budget of time."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler reports its start and stop

import psutil
import torch
from torch import Tensor

from helpers.speed.methods import Attention, Method, methods, reference
from helpers.speed.record import BOTH, FORWARD, Point, Record

SHORTEST, LONGEST = 2**8, 2**20
MOST_REPEATS = 25
CHECKED = {"cpu": (256,), "cuda": (256, 2048)}  # where few sequences are so long, the Triton kernel takes two passes
# Distance to float64 relative to the size; a method that is further away is not timed.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
METHOD = (
    "Each method is first compared with float64, one sequence at n = 256, on CUDA at 2,048, too. Then, length by "
    "length: a warm-up, after which the methods take turns, 3 to 25 times each, so that each finds the caches as "
    "another has left them; all repeats are kept. On CUDA a repeat "
    "lies between two events, after a write that empties the L2 cache; the time of Python's launches is in it, and "
    "counts where n is small. A curve ends when the next length would overdraw its share of the time or the free "
    "memory. Peak memory is what torch holds at most above the inputs."
)


@dataclass
class _Curve:
    """How far one method has come in one direction."""

    times: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    latest: float = 0.0
    spent: float = 0.0
    ended: str = ""


def measure(
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    batch: int = 1,
    heads: int | None = None,
    features: int = 64,
    seconds: float = 50.0,
    longest: int = LONGEST,
    only: list[str] | None = None,
    progress: bool = False,
) -> Record:
    """Time causal attention over n = 256, 512, … and see what memory it takes.

    Parameters
    ----------
    device
        "cpu", "cuda" or "auto" for a GPU if there is one.
    dtype
        None for bfloat16 on a GPU and float32 on a CPU.
    batch, heads, features
        Shape beside n; None for 16 heads on a GPU and 4 on a CPU.
    seconds
        Time for all of it. What the checks leave, a quarter at least, is shared evenly by the curves.
    longest
        Longest length.
    only
        Names of methods; None for all that the device has.
    progress
        Draw a bar on the error output.

    Returns
    -------
    Record

    Raises
    ------
    ValueError
        A setting that cannot be, or an unknown method.
    RuntimeError
        The device is not there, or nothing could be measured.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA GPU here: use --device cpu, or a torch that was built for CUDA")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = dtype or (torch.bfloat16 if kind == "cuda" else torch.float32)
    heads = (16 if kind == "cuda" else 4) if heads is None else heads
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(type_name, TOLERANCES))}, not {type_name(dtype)}")
    for name, value in (("batch", batch), ("heads", heads), ("features", features)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if longest < SHORTEST:
        raise ValueError(f"the longest length must be at least {SHORTEST}, not {longest}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, not {seconds}")

    begin, bar = time.perf_counter(), _Bar(progress)
    bench = _Bench(kind, dtype, (batch, heads, features))
    attentions, errors, left_out = bench.prepare(only, bar)
    if not attentions:
        raise RuntimeError("nothing could be measured: " + "; ".join(f"{a}: {b}" for a, b in left_out.items()))
    copy, products = bench.rates()
    record = Record(
        date=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        device=_describe_device(kind),
        versions=_versions(kind),
        settings={"batch": batch, "heads": heads, "features": features, "dtype": type_name(dtype), "seconds": seconds},
        method=METHOD,
        copy_bytes_per_second=copy,
        matmul_flop_per_second=products,
        functions={method.name: method.function for method in methods(kind) if method.name in attentions},
        errors=errors,
        left_out=left_out,
    )
    lengths = [2**p for p in range(SHORTEST.bit_length() - 1, longest.bit_length())]
    try:
        left = max(seconds - (time.perf_counter() - begin), seconds / 4)
        bench.sweep(attentions, lengths, left, record.points, bar)
    except KeyboardInterrupt:  # what is measured is not lost
        record.left_out["the rest"] = "interrupted"
    bar.close()
    return record


class _Bench:
    """One device, one type, one shape."""

    def __init__(self, kind: str, dtype: torch.dtype, shape: tuple[int, int, int]):
        self.kind, self.dtype, (self.batch, self.heads, self.features) = kind, dtype, shape
        self.tokens_first = {method.name for method in methods(kind) if method.tokens_first}
        # Larger than any L2 cache, and written before each repeat so that no input is still in there.
        self.flush = torch.empty(2**28 if kind == "cuda" else 0, dtype=torch.uint8, device=kind)

    def inputs(self, n: int, tokens_first: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and a gradient of the output."""
        generator = torch.Generator(self.kind).manual_seed(n)
        shape = (self.batch, self.heads, n, self.features)
        made = (torch.randn(shape, generator=generator, device=self.kind, dtype=self.dtype) for _ in range(4))
        q, k, v, g = (x.transpose(1, 2).contiguous().transpose(1, 2) if tokens_first else x for x in made)
        return q, k, v, g

    def prepare(self, only: list[str] | None, bar: _Bar) -> tuple[dict[str, Attention], dict, dict[str, str]]:
        """Keep the methods that run here and are right, with their errors; say why the others are left out.

        All that a method compiles is compiled here, so that it does not count as time of a length.
        """
        rivals = methods(self.kind)
        if unknown := set(only or ()) - {method.name for method in rivals}:
            names = ", ".join(method.name for method in rivals)
            raise ValueError(f"unknown on {self.kind}: {', '.join(sorted(unknown))}; there are {names}")
        attentions, errors, left_out = {}, {}, {}
        for method in rivals:
            if only and method.name not in only:
                continue
            bar.show(0.0, f"checking {method.name}")
            try:
                attention = method.prepare()
                found = [self.errors(method, attention, n) for n in CHECKED[self.kind]]
            except Exception as error:  # whatever a rival raises: it is named, and the others go on
                left_out[method.name] = _first_line(error)
                continue
            distances = [x for error in found for x in error.values()]
            if all(x <= TOLERANCES[self.dtype] for x in distances):  # false for NaN
                attentions[method.name] = attention
                errors[method.name] = {direction: max(e[direction] for e in found) for direction in (FORWARD, BOTH)}
            else:
                left_out[method.name] = (
                    f"differs from float64 by {', '.join(f'{x:.1e}' for x in distances)} of its size: not timed"
                )
        return attentions, errors, left_out

    def errors(self, method: Method, attention: Attention, n: int) -> dict[str, float]:
        """Distance of the first sequence and its three gradients to float64, each relative to its size."""
        *qkv, g = self.inputs(n, method.tokens_first)
        with torch.no_grad():
            alone = attention(*qkv)
        leaves = [x.requires_grad_() for x in qkv]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, g)
        exact = [x.detach()[:1, :1].double().requires_grad_() for x in qkv]
        true_out = reference(method.function, *exact)
        true_grads = torch.autograd.grad(true_out, exact, g[:1, :1].double())

        def distance(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
            a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (found, true))
            return float(f"{((a - b).norm() / b.norm()).item():.2g}")

        first = [x[:1, :1] for x in (alone, out, *grads)]
        return {FORWARD: distance(first[:2], [true_out] * 2), BOTH: distance(first[2:], true_grads)}

    def rates(self) -> tuple[float, float]:
        """Measure bytes a second of a copy, read and write counted, and FLOP a second of a product of matrices."""
        big, side = (2**28, 8192) if self.kind == "cuda" else (2**25, 1024)
        source, target = (torch.ones(big // 4, device=self.kind) for _ in range(2))
        a, b = (torch.randn(side, side, device=self.kind, dtype=self.dtype) for _ in range(2))

        def fastest(run: Callable[[], object]) -> float:
            times = [self.time(run), self.time(run)]
            while len(times) < 10 and sum(times) < 1.0:
                times.append(self.time(run))
            return min(times[1:])

        return 2 * big / fastest(lambda: target.copy_(source)), 2 * side**3 / fastest(lambda: a @ b)

    def sweep(
        self, attentions: dict[str, Attention], lengths: list[int], seconds: float, points: list[Point], bar: _Bar
    ) -> None:
        """Go over the lengths and append to `points`; a curve that ends leaves a point with a note."""
        curves = {(name, direction): _Curve() for name in attentions for direction in (FORWARD, BOTH)}
        share = seconds / len(curves)
        self.peak_memory(lambda: None)  # the profiler's first start takes a second, which is no method's share
        for step, n in enumerate(lengths):
            if all(curve.ended for curve in curves.values()):
                break
            bar.show(step / len(lengths), f"n = {n:,}")
            self.at(n, attentions, curves, share, points)

    def at(self, n: int, attentions: dict[str, Attention], curves: dict, share: float, points: list[Point]) -> None:
        """Measure one length; its inputs are gone afterwards, before the longer ones are made."""
        inputs = self.all_inputs(n, {name in self.tokens_first for name in attentions})
        for direction in (FORWARD, BOTH):
            runs = {}
            for name, attention in attentions.items():
                curve = curves[name, direction]
                if curve.ended:
                    continue
                curve.ended = self.obstacle(curve, share) if inputs else "out of memory: not even the inputs fit"
                if not curve.ended:
                    run = self.run(attention, direction, inputs[name in self.tokens_first])
                    if (warm := self.attempt(curve, lambda run=run: self.time(run))) is not None:
                        runs[name], curve.latest = run, warm
                if curve.ended:
                    points.append(Point(name, direction, n, [], note=curve.ended))
            points += self.points(n, direction, runs, curves, share)

    def all_inputs(self, n: int, layouts: set[bool]) -> dict[bool, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Make the inputs in each layout; nothing if they do not fit."""
        size = 4 * self.batch * self.heads * n * self.features * self.dtype.itemsize
        if 1.3 * len(layouts) * size > self.free_memory():
            return {}
        try:
            return {tokens_first: self.inputs(n, tokens_first) for tokens_first in layouts}
        except torch.OutOfMemoryError:
            return {}

    def points(
        self, n: int, direction: str, runs: dict[str, Callable[[], None]], curves: dict, share: float
    ) -> list[Point]:
        """Let the methods take turns, so that what disturbs one disturbs all."""
        repeats = {name: [] for name in runs}
        for turn in range(MOST_REPEATS):
            for name, run in runs.items():
                curve = curves[name, direction]
                if turn < max(3, share / 20 / curve.latest) and not curve.ended:
                    if (taken := self.attempt(curve, lambda run=run: self.time(run))) is not None:
                        repeats[name].append(taken)
        found = []
        for name, run in runs.items():
            curve = curves[name, direction]
            peak = None if curve.ended else self.attempt(curve, lambda run=run: self.peak_memory(run))
            if curve.ended:
                found.append(Point(name, direction, n, [], note=curve.ended))
                continue
            curve.times.append(statistics.median(repeats[name]))
            curve.peaks.append(peak)
            found.append(Point(name, direction, n, [float(f"{t:.4g}") for t in repeats[name]], peak))
        return found

    @staticmethod
    def run(attention: Attention, direction: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], None]:
        """Make what is timed."""
        *qkv, g = inputs

        def forward() -> None:
            with torch.no_grad():
                attention(*qkv)

        def both() -> None:
            leaves = [x.detach().requires_grad_() for x in qkv]
            torch.autograd.grad(attention(*leaves), leaves, g)

        return forward if direction == FORWARD else both

    def obstacle(self, curve: _Curve, share: float) -> str:
        """Say why the next length, twice the last, should not be tried; nothing if it may be."""
        if not curve.times:
            return ""
        growth = curve.times[-1] / curve.times[-2] if len(curve.times) > 1 else 4.0
        if curve.spent + 5 * curve.times[-1] * min(max(growth, 2.0), 4.5) > share:
            return "the next length would take longer than its share of the time"
        # A processor out of memory does not raise, it takes the machine down: so the next peak is estimated.
        needed = curve.peaks[-1] * (4 if len(curve.peaks) < 2 else curve.peaks[-1] / max(1, curve.peaks[-2]))
        if self.kind == "cpu" and 2 * needed > (free := self.free_memory()):
            return f"out of memory: the next length needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return ""

    def attempt(self, curve: _Curve, action: Callable[[], float]) -> float | None:
        """Carry out one action of a curve; if it fails, the curve ends, and no other does."""
        begin = time.perf_counter()
        try:
            result = action()
        except torch.OutOfMemoryError:
            curve.ended = "out of memory"
        except Exception as error:  # whatever a rival raises at this length
            curve.ended = _first_line(error)
        else:
            return result
        finally:
            curve.spent += time.perf_counter() - begin
            if curve.ended and self.kind == "cuda":
                with contextlib.suppress(RuntimeError):  # after some errors a GPU answers nothing any more
                    torch.cuda.empty_cache()
        return None

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.kind == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_memory(self, run: Callable[[], object]) -> int:
        """Bytes that torch holds at most during the call, above what it held before."""
        if self.kind == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def free_memory(self) -> float:
        """Bytes that can still be taken."""
        if self.kind == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch keeps it, and gives it again
            return torch.cuda.mem_get_info()[0] + unused
        free = psutil.virtual_memory().available
        try:  # in a container, such as Binder's, less than the machine has
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        except (OSError, ValueError):
            return free
        return min(free, limit - used)


class _Bar:
    """A progress bar on the error output, or nothing."""

    def __init__(self, visible: bool):
        self.visible = visible

    def show(self, done: float, doing: str) -> None:
        if self.visible:
            filled = round(30 * done)
            print(f"\r[{'█' * filled}{'·' * (30 - filled)}] {doing:<40}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.visible:
            print("\r" + " " * 75 + "\r", end="", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def type_name(dtype: torch.dtype) -> str:
    """Name of a type as on the command line and in a record."""
    return str(dtype).removeprefix("torch.")


def _describe_device(kind: str) -> dict[str, str | int]:
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "kind": kind,
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():  # Linux, where platform does not tell
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return {"kind": kind, "name": name, "threads": torch.get_num_threads()}


def _versions(kind: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if kind == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        for package in ("triton", "flash-linear-attention"):
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
    return versions

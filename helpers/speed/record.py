"""What a measurement leaves behind, as JSON: the device, the versions, the method, every repeat, and what follows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORWARD, BOTH = "forward", "forward + backward"
RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Point:
    """One method at one length.

    Attributes
    ----------
    method, direction
        `direction` is "forward" or "forward + backward".
    n
        Tokens.
    seconds
        Every repeat; empty if there is none, and then `note` says why.
    peak_bytes
        The most memory held at one time above the inputs, or None.
    note
        Why the curve ends here.
    """

    method: str
    direction: str
    n: int
    seconds: list[float]
    peak_bytes: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Median of the repeats, in seconds."""
        return statistics.median(self.seconds)

    @property
    def noisy(self) -> bool:
        """Whether something disturbed it: a quarter of the repeats took 1.5 times as long as another quarter."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high > 1.5 * low


@dataclass(frozen=True)
class Record:
    """One run of the benchmark.

    Attributes
    ----------
    date
        ISO 8601.
    device
        Name, kind ("cpu" or "cuda"), threads or multiprocessors, memory in bytes.
    versions
        Of Python, torch, and where they are used Triton, CUDA and flash-linear-attention.
    settings
        batch, heads, features, dtype, and the seconds that were allowed.
    method
        How it was measured, in a sentence.
    copy_bytes_per_second, matmul_flop_per_second
        What the device does at best, the fastest of some repeats; each byte read and each byte written counts.
    functions
        Which function a method computes: "softmax", "linear" (elu + 1 and the normaliser) or "bare" (neither).
    errors
        For each method and direction, the distance to float64, relative to the size.
    left_out
        Methods that were not measured, and why.
    points
        All that was measured.
    """

    date: str
    device: dict[str, str | int]
    versions: dict[str, str]
    settings: dict[str, str | int | float]
    method: str
    copy_bytes_per_second: float
    matmul_flop_per_second: float
    functions: dict[str, str]
    errors: dict[str, dict[str, float]]
    left_out: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def curve(self, method: str, direction: str) -> list[Point]:
        """Points with a time, from the shortest length on."""
        chosen = (p for p in self.points if p.method == method and p.direction == direction and p.seconds)
        return sorted(chosen, key=lambda point: point.n)

    def exponent(self, method: str, direction: str, last: int = 3) -> float | None:
        """Slope of log time against log n over the last points: 1 where time is proportional to n, 2 to n²."""
        curve = self.curve(method, direction)[-last:]
        if len(curve) < last:
            return None
        return float(np.polyfit(np.log([p.n for p in curve]), np.log([p.median for p in curve]), 1)[0])

    def crossing(self, slow: str, fast: str, direction: str) -> float | None:
        """Find the length from which on `fast` takes less time than `slow`, between the points along a power law.

        None if it never does; the shortest length if it always does.
        """
        slow_at = {p.n: p.median for p in self.curve(slow, direction)}
        gain = [(p.n, np.log(slow_at[p.n] / p.median)) for p in self.curve(fast, direction) if p.n in slow_at]
        if not gain or gain[-1][1] <= 0:
            return None
        for (n0, g0), (n1, g1) in reversed(list(itertools.pairwise(gain))):
            if g0 <= 0:
                return float(n0 * (n1 / n0) ** (-g0 / (g1 - g0)))
        return float(gain[0][0])

    def floor(self, function: str, direction: str, n: int) -> float:
        """Least possible seconds: what the FLOP take at the rate of products, or the bytes at that of copies, if more.

        Causal softmax attention does 2n²d FLOP, linear attention 4nd², and their gradients twice as many more, if all
        of the forward pass is kept. Both read q, k, v and write o; a gradient reads them and dO and writes dq, dk, dv.
        """
        sequences = self.settings["batch"] * self.settings["heads"]
        d, both = self.settings["features"], direction == BOTH
        flop = (3 if both else 1) * sequences * (2 * n * n * d if function == "softmax" else 4 * n * d * d)
        size = {"float32": 4, "float16": 2, "bfloat16": 2}[self.settings["dtype"]]
        moved = (11 if both else 4) * sequences * n * d * size
        return max(flop / self.matmul_flop_per_second, moved / self.copy_bytes_per_second)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            The file is no record.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content | {"points": [Point(**point) for point in content["points"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no record of a measurement: {error}") from error


def load_records(folder: Path = RECORDS) -> list[Record]:
    """Return the measurements that travel with the notebooks, those of GPUs first."""
    records = [Record.load(path) for path in sorted(folder.glob("*.json"))]
    return sorted(records, key=lambda record: record.device["kind"] != "cuda")

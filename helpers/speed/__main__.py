"""Measure attention with and without a softmax on this machine: ``python -m helpers.speed --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from helpers.speed import benchmark, report
from helpers.speed.methods import methods
from helpers.teaching import set_style

TYPES = {benchmark.type_name(dtype): dtype for dtype in benchmark.TOLERANCES}


def main(arguments: list[str] | None = None) -> int:
    """Run one measurement for each width; the exit status is 0 when all is well."""
    names = ", ".join(method.name for method in methods("cuda"))
    parser = argparse.ArgumentParser(prog="python -m helpers.speed", description=__doc__)
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one"
    )
    parser.add_argument("--dtype", choices=list(TYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, help="default: 16 on a GPU, 4 on a CPU")
    parser.add_argument("--features", type=int, nargs="+", default=[64], help="of a head; one measurement for each")
    parser.add_argument("--seconds", type=float, default=50.0, help="of each measurement (default: 50)")
    parser.add_argument("--longest", type=int, default=benchmark.LONGEST, help="longest n (default: 2^20)")
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"out of: {names}")
    parser.add_argument("--to", type=Path, default=Path("build/speed"), help="folder for the JSON and the picture")
    chosen = parser.parse_args(arguments)
    set_style()
    if chosen.threads is not None:
        if chosen.threads < 1:
            parser.error(f"--threads must be at least 1, not {chosen.threads}")
        torch.set_num_threads(chosen.threads)
    try:
        chosen.to.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring, not after
        for features in chosen.features:
            record = benchmark.measure(
                device=chosen.device, dtype=TYPES.get(chosen.dtype), batch=chosen.batch, heads=chosen.heads,
                features=features, seconds=chosen.seconds, longest=chosen.longest, only=chosen.only,
                progress=sys.stderr.isatty(),
            )  # fmt: skip
            print(report.summarise(record), flush=True)
            path = chosen.to / f"{report.stem(record)}.json"
            record.save(path)
            report.draw(record).savefig(path.with_suffix(".png"))
            print(f"\nwritten: {path} and the same as .png", flush=True)
            if "the rest" in record.left_out:
                break
    except KeyboardInterrupt:  # while the methods were checked; later on, what is measured is kept
        print("interrupted before anything was measured", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

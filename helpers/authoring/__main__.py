"""The maintainer's commands; ``python -m helpers.authoring --help`` lists them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from helpers.authoring import bench, build, export, look, new
from helpers.authoring.lab import BrowserMissing


def main() -> int:
    """Run one command; the exit status is 0 when all is well."""
    parser = argparse.ArgumentParser(prog="python -m helpers.authoring", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    notebooks = {"nargs": "*", "type": Path, "default": build.notebooks(), "help": "default: all of them"}

    command = commands.add_parser("build", help="execute notebooks, clean and shrink what they store")
    command.add_argument("notebooks", **notebooks)
    command.add_argument("--check", action="store_true", help="write nothing; fail when a notebook is out of date")
    command.add_argument(
        "--fresh", action="store_true", help="store every output anew, also what depends on the machine"
    )

    command = commands.add_parser("look", help="save pictures of the pages as JupyterLab shows them")
    command.add_argument("notebooks", **notebooks)
    command.add_argument("--to", type=Path, default=Path("pictures"), help="folder for the pictures")

    command = commands.add_parser("animate", help="record one widget's first slider moving, as a GIF")
    command.add_argument("notebook", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--widget", type=int, default=1, help="which widget of the notebook, from 1")

    command = commands.add_parser("bench", help="time a step of every slider in a live kernel")
    command.add_argument("notebooks", **notebooks)

    command = commands.add_parser("export", help="write HTML pages whose pictures have alternative texts")
    command.add_argument("notebooks", **notebooks)
    command.add_argument("--slides", action="store_true", help="slides instead of pages")
    command.add_argument("--to", type=Path, default=Path("build/html"), help="folder for the pages")

    command = commands.add_parser("train", help="record the trainings of a topic; takes minutes")
    command.add_argument("topic", help="such as 08_linear_attention")

    command = commands.add_parser("new", help="start a topic: notebook, helper module and test")
    command.add_argument("name", help="such as 13_diffusion")

    arguments = parser.parse_args()
    for path in getattr(arguments, "notebooks", []):
        if not path.is_file():
            parser.error(f"there is no notebook {path}")
    if arguments.command == "train":
        from helpers.authoring import train  # here: it needs torch and all topics, which no other command does

        if arguments.topic not in train.VARIANTS:
            parser.error(f"there are no trainings of {arguments.topic!r}: choose from {', '.join(train.VARIANTS)}")
        print(train.record(arguments.topic))
        return 0
    try:
        return run(arguments)
    except (BrowserMissing, build.BuildError, new.NameTaken, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Carry out the parsed command line."""
    match arguments.command:
        case "build":
            built = []
            for path in arguments.notebooks:
                built.append(build.build(path, check=arguments.check, fresh=arguments.fresh))
                print(built[-1], flush=True)
            return int(arguments.check and any(one.changed for one in built))
        case "look":
            for path in arguments.notebooks:
                for picture in look.look(path, arguments.to / path.stem):
                    print(picture, flush=True)
        case "animate":
            look.animate(arguments.notebook, arguments.target, widget=arguments.widget)
        case "bench":
            print(bench.HEADER)
            slow = 0
            for path in arguments.notebooks:
                for timing in bench.bench(path):
                    print(timing, flush=True)
                    slow += timing.median > bench.LIMIT_MS
            print(f"{slow} controls above {bench.LIMIT_MS:.0f} ms")
            return int(slow > 0)
        case "export":
            for path in arguments.notebooks:
                print(export.export(path, arguments.to, slides=arguments.slides))
        case "new":
            for path in new.new(arguments.name):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

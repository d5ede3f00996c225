"""Everything that waits for a GPU, in order of worth, in any number of minutes.

    python -m benchmarks.gpu --minutes 9 --output benchmarks/results/gpu --data DIR --wheels DIR
    python -m benchmarks.gpu --rehearse --output DIR     # every stage on a CPU at toy size: finds silly mistakes

Each stage is a process of its own with a time of its own: one that hangs or fails costs its share. Figures are written as
soon as they are there, to ``gpu.json`` and ``gpu.md``; called again with the same folder, it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu.book import Book
from benchmarks.gpu.schedule import EVERY, STARTED, card, chosen, run, run_one


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all that may be spent")
    parser.add_argument("--output", type=Path, required=True, help="folder of the figures; of one card")
    parser.add_argument("--data", type=Path, help="folder of cifar10.npz; without it there is no training on CIFAR-10")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of geomloss, torchattacks and others")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size, to see that all runs")
    parser.add_argument("--stages", nargs="+", choices=[s.name for s in EVERY], help="only these")
    parser.add_argument("--one", metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is None:
        check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot work, before any of the minutes is spent."""
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device: run it where there is one, or see that all runs with --rehearse.")
    first = chosen(options)[0]
    least = STARTED + (0 if options.rehearse else 0.5 * first.seconds)
    if 60 * options.minutes < least:
        parser.error(
            f"--minutes {options.minutes:g} is too few for the first stage, {first.name!r}, which takes {least / 60:.2g} at least."
        )
    if options.data is not None and not (options.data / "cifar10.npz").is_file():
        parser.error(
            f"--data {options.data} has no cifar10.npz (x_train, y_train, x_test, y_test): name the folder that has it, or leave --data out."
        )
    if options.wheels is not None and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} holds no wheels (*.whl).")
    found = Book(options.output).content()["about"].get("card")
    if found not in (None, card(options)):
        parser.error(
            f"--output {options.output} holds figures of {found}, and this is {card(options)}: name another folder."
        )


def main() -> None:
    options = arguments()
    sys.exit(run(options) if options.one is None else run_one(options))


if __name__ == "__main__":
    main()

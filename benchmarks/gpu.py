"""Everything that waits for a GPU, in order of worth, in any number of minutes.

    python benchmarks/gpu.py --minutes 9 --output benchmarks/results/gpu --data DIR --wheels DIR
    python benchmarks/gpu.py --rehearse --output DIR     # every stage on a CPU at toy size: finds silly mistakes

Each stage is a process of its own with a time of its own: one that hangs or fails costs its share. Figures are written as
soon as they are there, to ``gpu.json`` and ``gpu.md``; called again with the same folder, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from gpu_stages.book import Book  # noqa: E402
from gpu_stages.context import Context  # noqa: E402

GRACE = 5.0
"""Seconds between the end of a stage's time and its end by force."""
LINES = 60
"""Most lines of the table that is printed last."""
STARTED = 8.0
"""Seconds that a stage needs to start."""
PACKAGES = "torch", "triton", "lightning", "torchmetrics", "geomloss", "torchattacks", "flash-sinkhorn", "POT"
UNFINISHED, FAULTY = 3, 4
"""Exit statuses of a stage that had no time for some figures, and of one with figures that failed."""


class Stage(NamedTuple):
    """A module with a function ``run(context)``.

    Attributes:
        module: its name.
        title: for people.
        seconds: that it may take; the last one has what is left.
        needs_data: whether it is left out without ``--data``; at toy size it never needs any.
    """

    module: str
    title: str
    seconds: float
    needs_data: bool = False

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


STAGES = (
    Stage("gpu_stages.kernels", "Triton kernels against float64", 75),
    Stage("gpu_stages.transport", "The Sinkhorn divergence with its gradients", 100),
    Stage("gpu_stages.training", "A training step of ResNet-18", 60),
    Stage("gpu_stages.suite", "CUDA cases, precisions, attacks", 130),
    Stage("gpu_stages.cifar", "CIFAR-10, PreAct ResNet-18, eps 8/255", 300, needs_data=True),
)
ON_REQUEST = (Stage("gpu_stages.tiles", "Tile sizes and precisions of the streaming kernels", 60),)
"""Stages that only ``--stages`` runs."""
EVERY = (*STAGES, *ON_REQUEST)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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


def chosen(options: argparse.Namespace) -> list[Stage]:
    return [stage for stage in EVERY if (stage.name in options.stages if options.stages else stage in STAGES)]


def card(options: argparse.Namespace) -> str:
    return "a rehearsal on a CPU" if options.rehearse else torch.cuda.get_device_name()


def versions(path: list[str]) -> dict[str, str]:
    """Of the packages that the stages will find."""
    found = {}
    for package in PACKAGES:
        for distribution in metadata.distributions(name=package, path=[*path, *sys.path]):
            found[package] = distribution.version
            break
    return found


def installed(wheels: Path | None, folder: str) -> list[str]:
    """Folders to look for packages in, with what the wheels hold. Nothing is fetched."""
    if wheels is None:
        return []
    files = [str(file) for file in sorted(wheels.glob("*.whl"))]
    pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
    outcome = subprocess.run([sys.executable, *pip, folder, *files], capture_output=True, text=True)
    if outcome.returncode:
        print(
            f"The wheels could not be installed, so their stages' parts are left out: {outcome.stderr.strip()[-300:]}",
            flush=True,
        )
    return [folder]


def environment(options: argparse.Namespace, path: list[str]) -> dict[str, str]:
    """Of a stage's process."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(HERE.parent), str(HERE), *path, *([before] if before else [])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        fixed |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed}


def perform(stage: Stage, options: argparse.Namespace, seconds: float, path: list[str]) -> str:
    """Run a stage in a process of its own, and all that it starts; what became of it."""
    command = [sys.executable, str(HERE / "gpu.py"), "--one", stage.module, "--minutes", str(seconds / 60)]
    command += ["--output", str(options.output)] + (["--data", str(options.data)] if options.data else [])
    command += ["--rehearse"] if options.rehearse else []
    process = subprocess.Popen(command, env=environment(options, path), start_new_session=True)
    try:
        code = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return f"killed after {seconds + GRACE:.0f} s"
    finally:
        kill(process)
    return {0: "done", UNFINISHED: "out of time", FAULTY: "figures are missing"}.get(
        code, f"failed with exit status {code}"
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """A process, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(options: argparse.Namespace) -> int:
    """All stages; how many of them did not end well."""
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    book = Book(options.output)
    with tempfile.TemporaryDirectory() as folder:
        path = installed(options.wheels, folder)
        with book.changing() as content:
            content["about"] = {"card": card(options), **versions(path), "python": platform.python_version()}
        for stage in chosen(options):
            if book.stage(stage.name).get("state") == "done":
                continue
            book.note(stage.name, title=stage.title)
            if stage.needs_data and options.data is None and not options.rehearse:
                book.note(stage.name, state="left out: it needs --data")
                continue
            left = 60 * options.minutes - (time.monotonic() - began) - GRACE
            seconds = left if stage is STAGES[-1] else min(left, stage.seconds)
            if seconds < STARTED:
                book.note(stage.name, state="not begun: no time was left")
                continue
            print(f"== {stage.title}: {seconds:.0f} s", flush=True)
            start = time.monotonic()
            state = perform(stage, options, seconds, path)
            book.note(stage.name, state=state, seconds=round(time.monotonic() - start, 1))
    print(summary(book), flush=True)
    states = [book.stage(stage.name)["state"] for stage in chosen(options)]
    return sum(not state.startswith(("done", "left out")) for state in states)


def run_one(options: argparse.Namespace) -> int:
    """One stage, in this process."""
    stage = importlib.import_module(options.one)
    name = options.one.rpartition(".")[2]
    book = Book(options.output)
    book.note(name, about=" ".join((stage.__doc__ or "").split()))
    context = Context(name, book, time.monotonic() + 60 * options.minutes, options.rehearse, options.data)
    stage.run(context)
    rows = book.stage(name).get("rows", {}).values()
    if any("error" in row or row.get("right") is False for row in rows):
        return FAULTY
    return UNFINISHED if context.missing else 0


def summary(book: Book) -> str:
    """One table of all, of at most :data:`LINES` lines: long stages lose rows of their middle."""
    stages = book.content()["stages"]
    room = LINES - 2 - len(stages)
    lines = [f"{'stage':10} {'figure':42} found", "-" * 100]
    for i, (name, stage) in enumerate(stages.items()):
        lines.append(f"{name:10} {stage.get('state', '?'):42} {stage.get('seconds', '')} s")
        rows = [(key, ", ".join(f"{k} {v}" for k, v in row.items())) for key, row in stage.get("rows", {}).items()]
        later = len(stages) - i - 1
        most = min(len(rows), max(0, room // (later + 1)))
        cut = len(rows) > most
        shown = rows if not cut else rows[: max(0, most - 1)]
        lines += [f"{'':10} {key[:42]:42} {text[:150]}" for key, text in shown]
        if cut and most:
            lines.append(f"{'':10} ... and {len(rows) - len(shown)} more in gpu.md")
        room -= min(most, len(rows))
    return "\n".join(lines[:LINES])


def main() -> None:
    options = arguments()
    sys.exit(run(options) if options.one is None else run_one(options))


if __name__ == "__main__":
    main()

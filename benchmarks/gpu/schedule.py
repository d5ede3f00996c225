"""Which stages there are, and how each is run in the time that it has: as a process of its own."""

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

import torch

from benchmarks.gpu.book import Book, summary
from benchmarks.gpu.context import Context

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0
"""Seconds between the end of a stage's time and its end by force."""
STARTED = 8.0
"""Seconds that a stage needs to start."""
REHEARSED = 3.0
"""How many times as long a stage may take in a rehearsal, which a loaded machine may slow down."""
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
    Stage("benchmarks.gpu.stages.kernels", "Triton kernels against float64", 75),
    Stage("benchmarks.gpu.stages.transport", "The Sinkhorn divergence with its gradients", 100),
    Stage("benchmarks.gpu.stages.training", "A training step of ResNet-18", 60),
    Stage("benchmarks.gpu.stages.suite", "CUDA cases, precisions, attacks", 130),
    Stage("benchmarks.gpu.stages.cifar", "CIFAR-10, PreAct ResNet-18, eps 8/255", 300, needs_data=True),
)
ON_REQUEST = (Stage("benchmarks.gpu.stages.tiles", "Tile sizes and precisions of the streaming kernels", 60),)
"""Stages that only ``--stages`` runs."""
EVERY = (*STAGES, *ON_REQUEST)


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
    paths = [str(ROOT), *path, *([before] if before else [])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        fixed |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed}


def perform(stage: Stage, options: argparse.Namespace, seconds: float, path: list[str]) -> str:
    """Run a stage in a process of its own, and all that it starts; what became of it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", stage.module, "--minutes", str(seconds / 60)]
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
            share = stage.seconds * (REHEARSED if options.rehearse else 1)
            seconds = left if stage is STAGES[-1] else min(left, share)
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

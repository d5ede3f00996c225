"""The debiased Sinkhorn divergence with its gradients to both clouds, against peers.

Milliseconds by the wall clock at an error of the gradients against a float64 solution. The floor is what the launches of ours cost
on this machine, and three cost matrices written once and read twice. ``as a graph`` is ours with ``LIGHTNING_WDEFENSE_RECORD=1``,
``judged step by step`` is ours where the host waits for the device to judge each part. ``tuned`` is the fastest scaling whose
gradient error is at most 1%.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.book import Row
from benchmarks.gpu.context import Context, launches, peak_mib, timed
from benchmarks.sinkhorn.peers import _flash, _geomloss, _ours
from benchmarks.sinkhorn.problems import Case, make_case, worst_errors
from benchmarks.sinkhorn.problems import Row as Problem

TARGET = 1e-2
"""Gradient error at which sides are compared."""
SCALINGS = (0.7, 0.8, 0.9, 0.95, 0.98)
HOPELESS = 10
"""Times the target above which, from the third scaling on, no finer one is tried."""
PROBLEMS = [
    (Problem("adv", 128, 512), 0.2), (Problem("adv", 1024, 512), 0.2), (Problem("adv", 4096, 512), 0.2),
    (Problem("adv", 64, 10), 0.2), (Problem("adv", 512, 512), 0.2), (Problem("adv", 256, 512), 0.2),
    (Problem("adv", 2048, 512), 0.2), (Problem("adv", 64, 10, batch=32), 0.2), (Problem("adv", 128, 128, batch=32), 0.2),
    (Problem("adv", 128, 512), 0.05), (Problem("adv", 1024, 512), 0.05), (Problem("adv", 512, 512), 0.05),
    (Problem("adv", 64, 10), 0.05), (Problem("adv", 4096, 512), 0.05),
]  # fmt: skip
TOYS = [(Problem("adv", 4, 3, batch=2), 0.2)]
STREAMED = (20_000, 100_000)
FLASH = PROBLEMS[1:3]
"""Those that flash-sinkhorn is tried on, last of all: it compiles for long."""
REFERENCES = Path(tempfile.gettempdir()) / "gpu_references"


def machine(context: Context) -> Row:
    """Bytes a second of a large copy, and microseconds of a small launch, in a row of many."""
    size = 2**14 if context.rehearse else 2**28
    source = torch.empty(size, device=context.device).normal_()
    target, small = torch.empty_like(source), torch.zeros(8, device=context.device)
    copy = timed(lambda: target.copy_(source), context)["ms"]

    def many() -> None:
        for _ in range(200):
            small.add_(1.0)

    return {"copy, GB/s": 8 * size / copy / 1e6, "launch, us": 1e3 * timed(many, context)["ms"] / 200}


def side(call: Callable[[], tuple[Tensor, Tensor, Tensor]], case: Case, context: Context) -> Row:
    """Time and errors of one side."""
    with torch.enable_grad():
        error = worst_errors(call(), case.exact)
        return {"gradient error": error.gradient, **timed(call, context)}


def compare(problem: Problem, blur: float, context: Context) -> Row:
    """All sides on one problem."""
    case = make_case(problem, blur, 0, REFERENCES, context.device.type)
    call = _ours({}, case.x, case.y, case.blur)
    ours = side(call, case, context)
    found = {"ours, ms": ours["ms"], "10% to 90%": ours["10% to 90%"], "gradient error": ours["gradient error"]}
    with mock.patch("lightning_wdefense.transport.entropic.gpu.graphs.DEVICES", frozenset({"cuda"})):
        again = side(call, case, context)
        found |= {"as a graph, ms": again["ms"], "the graph's error": worst_errors(call(), case.exact).gradient}
    with mock.patch("lightning_wdefense.transport.entropic.evaluation._speculate", return_value=None):
        found["judged step by step, ms"] = side(call, case, context)["ms"]
    constants = context.book.stage(context.stage)["rows"].get("this machine", {})
    found["launches"] = launches(call)
    if "copy, GB/s" in constants:
        traffic = 3 * 3 * 4 * problem.batch * problem.n**2 / constants["copy, GB/s"] / 1e6
        found["floor, ms"] = traffic + found["launches"] * constants["launch, us"] / 1e3
    if importlib.util.find_spec("geomloss"):
        default = side(_geomloss({}, case.x, case.y, case.blur), case, context)
        found |= {
            "geomloss default, ms": default["ms"],
            "its error": default["gradient error"],
            "ratio to it": default["ms"] / ours["ms"],
        }
        found |= tuned("geomloss", _geomloss, case, context, ours["ms"])
    return found


def flash(problem: Problem, blur: float, context: Context) -> Row:
    """flash-sinkhorn, tuned, without its search for tile sizes, which takes longer than this stage has."""
    case = make_case(problem, blur, 0, REFERENCES, context.device.type)
    ours = context.book.stage(context.stage)["rows"][f"{problem.name}, blur {blur:g}"]["ours, ms"]
    return tuned(
        "flash-sinkhorn", lambda setting, *rest: _flash(setting | {"autotune": False}, *rest), case, context, ours
    )


def tuned(name: str, prepare: Callable[..., Any], case: Case, context: Context, ours: float) -> Row:
    """The first scaling, from coarse to fine, that is accurate enough."""
    least = float("inf")
    for i, scaling in enumerate(SCALINGS):
        with torch.enable_grad():
            call = prepare({"scaling": scaling}, case.x, case.y, case.blur)
            error = worst_errors(call(), case.exact).gradient
            least = min(least, error)
            if error <= TARGET:
                taken = timed(call, context, most=1.0)["ms"]
                return {f"{name} tuned, ms": taken, f"ratio to {name} tuned": taken / ours}
            if i >= 2 and error > HOPELESS * TARGET:
                break
    return {f"{name} tuned, ms": f"none to {scaling}: {least:.2g}"}


def streamed(size: int, context: Context) -> Row:
    """Clouds that are too large for a stored cost."""
    from lightning_wdefense.transport import sinkhorn_divergence

    size = 6 if context.rehearse else size
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, 64, generator=rng).to(context.device) / 8 for _ in range(2))
    y = (0.9 * y + 0.05).requires_grad_()
    x.requires_grad_()

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autograd.grad(sinkhorn_divergence(x, y), (x, y))

    peak = peak_mib(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if not context.rehearse else (None, None)
    if start is None or end is None:
        return {"peak MiB": peak}
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return {"ms": start.elapsed_time(end), "peak MiB": peak, "a stored cost, MiB": 4 * size**2 / 2**20}


def run(context: Context) -> None:
    context.measure("this machine", lambda: machine(context))
    problems = TOYS if context.rehearse else PROBLEMS
    for i, (problem, blur) in enumerate(problems):
        context.measure(f"{problem.name}, blur {blur:g}", lambda p=problem, b=blur: compare(p, b, context), seconds=5)
        if i == min(1, len(problems) - 1):  # early, for they say most
            for size in STREAMED:
                context.measure(f"{size} points, streamed", lambda size=size: streamed(size, context), seconds=10)
    if importlib.util.find_spec("flash_sinkhorn") and not context.rehearse:
        for problem, blur in FLASH:
            name = f"flash-sinkhorn, {problem.name}, blur {blur:g}"
            context.measure(name, lambda p=problem, b=blur: flash(p, b, context), seconds=20)

"""The Triton kernels against float64, and what happens where one fails.

Potentials are judged by the marginals of their plan, which are exact at the solution; sums over kernels that are never stored by
the same sums in float64.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.book import Row
from benchmarks.gpu.context import Context

TOL = 1e-3
"""Marginal error that the kernels are asked for."""
WORKERS = 8
"""Processes that compile kernels side by side."""
SANITIZED = 30.0
"""Seconds that compute-sanitizer may take."""

SIZES = (
    (64, 64, 1), (64, 64, 32), (128, 128, 1), (128, 128, 32), (1024, 1024, 1), (512, 512, 1), (256, 256, 8), (2000, 2048, 1),
    (16, 16, 1), (30, 50, 1), (100, 128, 4), (200, 256, 1), (1000, 1000, 1),
)  # fmt: skip
SMALL_SIZES = ((5, 7, 2),)
STREAMS = (
    (5, 130, 3),
    (64, 64, 16),
    (70, 66, 21),
    (300, 400, 1000),
    (5000, 7001, 100),
    (20000, 20000, 64),
    (4096, 4096, 512),
    (1000, 3, 2),
)
SMALL_STREAMS = ((5, 13, 3),)


class Solve(NamedTuple):
    """A problem of ``n`` and ``m`` points, and how it is solved."""

    n: int
    m: int
    batch: int
    blur: float
    reach: float | None

    @property
    def name(self) -> str:
        size = f"{self.batch} x " * (self.batch > 1) + f"{self.n} x {self.m}"
        return f"{size}, blur {self.blur:g}" + (", unbalanced" if self.reach else "")


def solves(context: Context) -> list[list[Solve]]:
    """Problems by size, for each size needs kernels of its own."""
    sizes = SMALL_SIZES if context.rehearse else SIZES
    kinds = list(itertools.product((0.2,) if context.rehearse else (0.2, 0.05), (None, 1.0)))
    return [[Solve(*size, *kind) for kind in kinds] for size in sizes]


def check_solve(case: Solve, device: str) -> Row:
    """Errors of the marginals in float64, and how long a solve took."""
    from lightning_wdefense.transport.entropic.triton import potential

    rng = torch.Generator().manual_seed(case.n + 31 * case.m)
    x, y = (torch.randn(case.batch, size, 16, generator=rng).to(device) for size in (case.n, case.m))
    a, b = (0.2 + torch.rand(case.batch, size, generator=rng).to(device) for size in (case.n, case.m))
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    cost = 0.5 * torch.cdist(x, 0.8 * y + 0.2).square()
    mean = (a.unsqueeze(-1) * b.unsqueeze(-2) * cost).sum((1, 2))
    eps = (case.blur**2 * mean).unsqueeze(1)
    rho = None if case.reach is None else case.reach**2

    def solve() -> Tensor | None:
        found = potential(cost, a, b, eps, rho, mean.unsqueeze(1), TOL, 2000)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    g = solve()
    if g is None:
        raise RuntimeError("the kernel could not run")
    start = time.perf_counter()
    again = solve()
    seconds = time.perf_counter() - start
    error = float(marginal_error(cost, a, b, eps, rho, g).max())
    right = error <= 1.1 * TOL + 1e-5
    return {"right": right, "marginal error": error, "alike again": bool(torch.equal(g, again)), "ms": 1e3 * seconds}


def marginal_error(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None, g: Tensor) -> Tensor:
    """Root mean square of the relative error of the columns' marginal ``(B,)``, the rows being exact, in float64."""
    cost, a, b, eps, g = (each.double() for each in (cost, a, b, eps, g))
    share = 1.0 if rho is None else rho / (rho + eps)
    f = -eps * share * ((g / eps + b.log()).unsqueeze(-2) - cost / eps.unsqueeze(-1)).logsumexp(-1)
    plan = a.unsqueeze(-1) * b.unsqueeze(-2) * ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps.unsqueeze(-1)).exp()
    target = b if rho is None else b * (-g / rho).exp()
    return ((plan.sum(-2) - target).square() / target).sum(-1).sqrt() / target.sum(-1).sqrt()


def check_stream(n: int, m: int, d: int, device: str) -> Row:
    """Errors of the sums over a kernel that is never stored, against float64, in units of what they are exact to."""
    from lightning_wdefense.transport.entropic.triton.streaming import log_sums, weighted_points

    rng = torch.Generator().manual_seed(n + m)
    x, y = (torch.randn(size, d, generator=rng).to(device) / math.sqrt(d) for size in (n, m))
    exponents, eps = torch.randn(m, generator=rng).to(device), 0.05
    sums = log_sums(x, y, exponents, eps)
    averages = weighted_points(x, y, exponents, sums, eps)
    start = time.perf_counter()
    log_sums(x, y, exponents, eps)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    some = torch.randperm(n, generator=rng)[:2000].to(device)
    table = exponents.double() - 0.5 * torch.cdist(x[some].double(), y.double()).square() / eps
    exact = table.logsumexp(1)
    points = (table - exact[:, None]).exp() @ y.double()
    off, off_points = float((sums[some] - exact).abs().max()), float((averages[some] - points).abs().max())
    return {
        "right": off < 1e-3 and off_points < 1e-3,
        "log sums off by": off,
        "averages off by": off_points,
        "ms": 1e3 * seconds,
    }


def _checked(cases: list[Solve], device: str) -> list[tuple[str, Row]]:
    """In a process of its own."""
    rows = []
    for case in cases:
        try:
            rows.append((case.name, check_solve(case, device)))
        except Exception as error:
            rows.append(
                (case.name, {"right": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            )
    return rows


def take_over(context: Context) -> Row:
    """PyTorch's answers where the kernels raise, and where they return nonsense, beside those of the kernels."""
    import lightning_wdefense.transport.entropic.triton as kernels
    from lightning_wdefense.transport import sinkhorn_divergence
    from lightning_wdefense.transport.entropic.triton import small

    rng = torch.Generator().manual_seed(0)
    size = 4 if context.rehearse else 128
    x, y = (torch.randn(size, 5, generator=rng).to(context.device) for _ in range(2))
    expected, launch = sinkhorn_divergence(x.double(), y.double()), small.launch

    def broken(*args: object) -> None:
        raise RuntimeError("planted")

    def nonsense(*args: Tensor) -> None:
        launch(*args)  # type: ignore[arg-type]
        found, report = args[-2:]
        found.add_(100 * torch.randn_like(found))
        report.zero_()

    found: Row = {}
    for name, fault in {"raising": broken, "nonsense": nonsense}.items():
        with (
            mock.patch.object(small, "launch", fault),
            mock.patch("lightning_wdefense.transport.entropic.gpu.graphs.DEVICES", frozenset()),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            value = sinkhorn_divergence(x, y)
        kernels._failed.clear()
        found[f"{name}: off by"] = float((value / expected - 1).abs())
        found[f"{name}: warnings"] = len(caught)
    found["right"] = found["raising: warnings"] > 0  # else the fault was not met
    found["right"] &= all(value < 1e-3 for key, value in found.items() if key.endswith("off by"))
    return found


def sanitizer(context: Context) -> subprocess.Popen[str] | None:
    """Started beside the others, for it is slow."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if context.rehearse or not os.access(tool, os.X_OK):
        return None
    code = (
        "import torch; from benchmarks.gpu.stages.kernels import *; from lightning_wdefense.transport import sinkhorn_divergence; "
        "x = torch.randn(300, 5, device='cuda', requires_grad=True); sinkhorn_divergence(x, x.detach() + 0.1).backward(); "
        "sinkhorn_divergence(x[:40], x[:50].detach() + 0.1).backward(); torch.cuda.synchronize(); "
        "print(check_solve(Solve(40, 50, 1, .2, None), 'cuda'), check_stream(70, 66, 21, 'cuda'))"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sanitized(process: subprocess.Popen[str] | None, context: Context) -> Row:
    if process is None:
        return {"not run": "no compute-sanitizer here"}
    try:
        output, _ = process.communicate(timeout=max(1.0, min(SANITIZED, context.left)))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return {"not finished": "out of time", "its last words": output.strip()[-200:]}
    errors = next((line.strip("= ") for line in output.splitlines() if "ERROR SUMMARY" in line), "no summary")
    return {
        "right": process.returncode == 0,
        "compute-sanitizer": errors,
        "its last words": output.strip()[-200:] if process.returncode else "",
    }


def run(context: Context) -> None:
    device = context.device.type
    process = sanitizer(context)
    known = {name for name, row in context.book.stage(context.stage).get("rows", {}).items() if row.get("right")}
    pending = [cases for cases in solves(context) if any(case.name not in known for case in cases)]
    if context.rehearse:
        found = (_checked(cases, device) for cases in pending)
    else:
        pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"))
        found = (
            future.result() for future in as_completed([pool.submit(_checked, cases, device) for cases in pending])
        )
    for rows in found:
        for name, row in rows:
            context.book.row(context.stage, name, row)
    for shape in SMALL_STREAMS if context.rehearse else STREAMS:
        context.measure(f"streamed {' x '.join(map(str, shape))}", lambda shape=shape: check_stream(*shape, device))
    context.measure("PyTorch takes over", lambda: take_over(context))
    context.measure("compute-sanitizer", lambda: sanitized(process, context))
    rows = context.book.stage(context.stage)["rows"].values()
    judged = [row["right"] for row in rows if "right" in row]
    context.book.note(context.stage, right=f"{sum(judged)} of {len(judged)}")

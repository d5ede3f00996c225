"""The whole solve of transports of measures to themselves in one launch, as in :mod:`lightning_wdefense.transport.entropic.solver.symmetric`."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_wdefense.transport.entropic import constants
from lightning_wdefense.transport.entropic.triton.pairwise import STRIDE
from lightning_wdefense.transport.entropic.triton.persistent import Slabs, launch_settings, meet
from lightning_wdefense.transport.entropic.triton.small import gibbs

AVERAGING = tl.constexpr(constants.AVERAGING)


@triton.jit(do_not_specialize=["n", "rho", "tol", "max_iter"])
def average(
    cost,
    a,
    eps,
    potential,
    report,
    answers,
    arrived,
    n,
    rho,
    tol,
    max_iter,
    BALANCED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Potentials of all problems, ``PROGRAMS`` programs for each, and a report: the error and the number of iterations."""
    problem, own = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    rows, columns = own * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    stride = tl.cdiv(n, STRIDE) * STRIDE
    cost += problem.to(tl.int64) * n * stride
    answers, arrived = answers + problem * 2 * WIDTH, arrived + problem
    temperature = tl.load(eps + problem)
    a = tl.load(a + problem * n + columns, mask=columns < n, other=0.0)
    kept = a > 0
    log_a = tl.where(kept, tl.log(tl.where(kept, a, 1.0)), -float("inf"))
    mass = tl.sum(a, 0)
    share = 1.0 if BALANCED else rho / (rho + temperature)
    matrix, top = gibbs(cost, log_a, temperature, rows, columns, n, stride)
    w = tl.zeros([WIDTH], tl.float32)
    error = float("inf")
    n_iter = 0
    going = True
    while going:
        sums = tl.sum(matrix * tl.where(kept, tl.exp(w), 0.0)[None, :], 1)
        # Two places by turns: nobody writes again to what somebody may still read, as there is a meeting in between.
        place = answers + (n_iter % 2) * WIDTH
        tl.store(place + rows, (top + tl.log(sums)) * (0.0 - share), mask=rows < n)
        met = True
        if PROGRAMS > 1:
            met = meet(arrived, (n_iter + 1) * PROGRAMS)
        else:
            tl.debug_barrier()
        answer = tl.load(place + columns, mask=columns < n, other=0.0, cache_modifier=".cg")
        gap = tl.where(kept, answer - w, 0.0)
        wrong = tl.exp(gap * (0.0 - 1.0 / share)) - 1.0
        error = tl.sqrt(tl.sum(a * wrong * wrong, 0) / mass)
        n_iter += 1
        # Written so that NaN ends it.
        going = met & (error > tol) & (n_iter < max_iter)
        if going:
            w += gap * tl.where(n_iter == 1, 0.5, AVERAGING)
    if own == 0:
        tl.store(potential + problem * n + columns, w * temperature, mask=columns < n)
        tl.store(report + problem * 2, error)
        tl.store(report + problem * 2 + 1, n_iter)


def launch(
    cost: Tensor,
    a: Tensor,
    eps: Tensor,
    rho: float,
    tol: float,
    max_iter: int,
    slabs: Slabs,
    found: Tensor,
    report: Tensor,
) -> None:
    """Find potentials ``(B, N)``, and report errors and numbers of iterations ``(B, 2)``.

    Args:
        cost: costs ``(B, N, N)``, in rows of :data:`~lightning_wdefense.transport.entropic.triton.pairwise.ALIGNED` entries.
        a: weights ``(B, N)``.
        eps: temperatures ``(B,)``.
        rho: price of creating or destroying mass, infinite if it is forbidden.
        tol: error at which to stop.
        max_iter: most iterations.
        slabs: how each problem is spread.
        found: where the potentials go.
        report: where the report goes.
    """
    size, n, _ = cost.shape
    answers = torch.empty(size, 2, slabs.columns, device=a.device, dtype=torch.float32)
    arrived = torch.zeros(size, device=a.device, dtype=torch.int32)
    average[(size * slabs.programs,)](
        *(cost, a, eps, found, report, answers, arrived), *(n, rho, tol, max_iter), **settings(slabs, rho)
    )


def settings(slabs: Slabs, rho: float) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {"BALANCED": rho == math.inf, **launch_settings(slabs)}

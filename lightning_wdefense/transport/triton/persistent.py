"""The whole solve of a transport problem in one launch, the kernel matrix in registers from the first iteration to the last.

The algorithm is that of :mod:`lightning_wdefense.transport.solver`, with a simpler check of the extrapolation. A problem is
spread over one or more programs, each with a slab of rows. They meet twice in an iteration, to add up the column marginals;
everything else they all do alike, on the same numbers in the same order, so that they also take the same decisions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lightning_wdefense.transport import anderson, kernel, solver

WARMEST = tl.constexpr(solver.WARMEST)
LOG_COOLING = tl.constexpr(math.log(solver.COOLING))
ENTRY = tl.constexpr(solver.ENTRY)
WARM = tl.constexpr(solver.WARM)
ABSORBED = tl.constexpr(solver.ABSORBED)
TINY = tl.constexpr(solver.TINY)
FLOOR = tl.constexpr(kernel.FLOOR)
RIDGE = tl.constexpr(anderson.RIDGE)

GROWTH = tl.constexpr(3.0)
"""Growth of the error, from the smallest one, at which an extrapolation has gone astray."""

FARTHEST = tl.constexpr(1e4)
"""Largest exponent that an extrapolation may arrive at; none at all may be infinite or NaN."""

PATIENCE = tl.constexpr(2**22)
"""Polls, seconds in all, after which a program gives the others up: slow is better than hung."""

COLUMNS = 2048
"""Most columns: each program holds a few vectors of that length."""

SLAB = 2**14
"""Entries of the kernel matrix that are well kept in the registers of one program; twice as many are possible."""


class Slabs(NamedTuple):
    """How a problem is spread: so many programs, so many rows each."""

    programs: int
    rows: int


@triton.jit
def gibbs(cost, exponents, temperature, rows, columns, n, stride):
    """The kernel matrix of some rows, the largest entry of each scaled to one, and the logarithms of the scales."""
    inside = (rows < n)[:, None] & (columns < stride)[None, :]
    block = tl.load(cost + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    block = exponents[None, :] - block * (1 / temperature)
    top = tl.max(block, 1)
    kept = (exponents > -float("inf"))[None, :]
    return tl.where(kept, tl.exp(tl.maximum(block - top[:, None], FLOOR)), 0.0), top


@triton.jit
def solved(gram, right, slots, MEMORY: tl.constexpr):  # noqa: N803
    """Solution of a positive definite system by Gauss-Jordan elimination; the unknowns from ``MEMORY`` on are unused."""
    for k in tl.static_range(MEMORY):
        here = slots == k
        row = tl.sum(tl.where(here[:, None], gram, 0.0), 0)
        column = tl.where(here, 0.0, tl.sum(tl.where(here[None, :], gram, 0.0), 1))
        pivot = tl.sum(tl.where(here, row, 0.0), 0)
        value = tl.sum(tl.where(here, right, 0.0), 0) / pivot
        gram = tl.where(here[:, None], 0.0, gram) + tl.where(here, 1.0, -column)[:, None] * (row / pivot)[None, :]
        right = tl.where(here, value, right - column * value)
    return right


@triton.jit
def extrapolate(residuals, images, gram, step, advance, scaled, slot, slots, MEMORY: tl.constexpr):  # noqa: N803
    """Anderson's correction of the image, and the history with one more difference, at ``slot`` unless that is negative.

    See :mod:`lightning_wdefense.transport.anderson`: ``step`` and ``advance`` are the differences of the scaled residual and
    of the image from the last ones.
    """
    now = slots == slot
    residuals = tl.where(now[:, None], step[None, :], residuals)
    images = tl.where(now[:, None], advance[None, :], images)
    products = tl.sum(residuals * step[None, :], 1)
    gram = tl.where(now[:, None], products[None, :], tl.where(now[None, :], products[:, None], gram))
    ridge = tl.where(slots[:, None] == slots[None, :], 1.0 + RIDGE, 1.0)
    mixture = solved(gram * ridge, tl.sum(residuals * scaled[None, :], 1), slots, MEMORY)
    return residuals, images, gram, tl.sum(images * mixture[:, None], 0)


@triton.jit
def meet(arrived, expected):
    """Wait until the programs have arrived ``expected`` times in all; whether they have."""
    tl.debug_barrier()  # what all threads wrote comes before the arrival of one of them
    seen = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    polls = 0
    while (seen < expected) & (polls < PATIENCE):
        seen = tl.atomic_add(arrived, 0, sem="acquire")
        polls += 1
    tl.debug_barrier()
    return seen >= expected


@triton.jit
def add_up(part, share, totals, arrived, meetings, own, columns, PROGRAMS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
    """Sum of a vector over the programs, in a fixed order: each adds up its share of the columns for all.

    Loads bypass the first cache, which is not kept up to date with what other programs write. Nobody writes again to what
    somebody may still read: there is a meeting in between.
    """
    tl.store(share + own * WIDTH + columns, part)
    met = meet(arrived, (meetings + 1) * PROGRAMS)
    everyone = tl.arange(0, PROGRAMS)
    mine = own * (WIDTH // PROGRAMS) + tl.arange(0, WIDTH // PROGRAMS)
    parts = tl.load(share + everyone[:, None] * WIDTH + mine[None, :], cache_modifier=".cg")
    tl.store(totals + mine, tl.sum(parts, 0))
    met = met & meet(arrived, (meetings + 2) * PROGRAMS)
    return tl.load(totals + columns, cache_modifier=".cg"), met


@triton.jit(do_not_specialize=["n", "m", "rho", "tol", "max_iter", "warm"])
def sinkhorn(
    cost,
    a,
    b,
    eps,
    mean,
    start,
    potential,
    report,
    shares,
    totals,
    arrived,
    n,
    m,
    rho,
    tol,
    max_iter,
    warm,
    BALANCED: tl.constexpr,  # noqa: N803
    PROGRAMS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SLOTS: tl.constexpr,  # noqa: N803
    MEMORY: tl.constexpr,  # noqa: N803
):
    """Potentials of all problems, ``PROGRAMS`` programs for each, and a report: the error and the number of iterations."""
    problem, own = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    rows, columns, slots = own * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, SLOTS)
    # So that a thread loads, and then keeps, four columns at once: half the registers go to the vectors otherwise.
    stride = tl.cdiv(m, 16) * 16
    cost += problem.to(tl.int64) * n * stride
    shares, totals, arrived = shares + problem * PROGRAMS * WIDTH, totals + problem * WIDTH, arrived + problem
    eps, mean = tl.load(eps + problem), tl.load(mean + problem)
    a = tl.load(a + problem * n + rows, mask=rows < n, other=0.0)
    b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    kept = b > 0
    log_b = tl.where(kept, tl.log(tl.where(kept, b, 1.0)), -float("inf"))
    identity = tl.where(slots[:, None] == slots[None, :], 1.0, 0.0)

    levels = tl.floor(tl.log(tl.maximum(WARMEST * mean / eps, 1.0)) / LOG_COOLING).to(tl.int32)
    level = tl.where(warm > 0, 0, levels)
    untried = warm > 0  # whether the error at the given potential is still unknown
    g = tl.load(start + problem * m + columns, mask=kept, other=0.0)
    w = tl.zeros([WIDTH], tl.float32)
    resort = w  # the plain step from the best point of the level
    residuals, images, gram = tl.zeros([SLOTS, WIDTH], tl.float32), tl.zeros([SLOTS, WIDTH], tl.float32), identity
    last_image, last_scaled = w, w
    length = 0
    matrix, top = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS], tl.float32)
    error = float("inf")
    best = float("inf")
    stale = True  # whether the matrix has to be made anew
    n_iter = 0
    meetings = 0
    while level >= 0:
        temperature = eps * tl.exp2(3.0 * level)
        share = 1.0 if BALANCED else rho / (rho + temperature)
        if stale:
            matrix, top = gibbs(cost, log_b + g * (1 / temperature), temperature, rows, columns, n, stride)
            stale = False
        v = tl.where(kept, tl.exp(w), 0.0)
        sums = tl.sum(matrix * v[None, :], 1)
        if BALANCED:
            u, target, log_target = a / sums, b, log_b
        else:
            u = a * tl.exp((1 - share) * top - share * tl.log(sums))
            log_target = log_b - (g + temperature * w) / rho
            target = tl.where(kept, tl.exp(log_target), 0.0)
        marginal = tl.sum(matrix * u[:, None], 0)
        met = True
        if PROGRAMS > 1:
            marginal, met = add_up(marginal, shares, totals, arrived, meetings, own, columns, PROGRAMS, WIDTH)
            meetings += 2
        marginal = marginal * v
        gap = marginal - target
        error = tl.sqrt(tl.sum(gap * gap / tl.where(target > 0, target, 1.0), 0) / tl.sum(target, 0))
        residual = tl.where(kept, share * (log_target - tl.log(tl.maximum(marginal, TINY))), 0.0)
        n_iter += 1

        # Written so that NaN counts as large.
        astray = not (error <= GROWTH * best)
        poor = untried and not (error < WARM)
        untried = False
        if astray:
            w = resort
        if (error <= tl.where(level > 0, tl.maximum(tol, ENTRY), tol)) | (n_iter >= max_iter) | poor:
            g = tl.where(poor, 0.0, g + temperature * w)
            level = tl.where(poor, levels, level - 1)
            w, resort = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
            best, stale, length = float("inf"), True, 0
        elif astray:
            best, length = float("inf"), 0
        else:
            image, scaled = w + residual, residual * tl.sqrt(b)
            resort, best = tl.where(error < best, image, resort), tl.minimum(error, best)
            if length == 0:
                residuals, gram = tl.zeros([SLOTS, WIDTH], tl.float32), identity
            residuals, images, gram, correction = extrapolate(
                residuals,
                images,
                gram,
                scaled - last_scaled,
                image - last_image,
                scaled,
                tl.where(length > 0, length % MEMORY, -1),
                slots,
                MEMORY,
            )
            w = tl.where(tl.abs(image - correction) <= FARTHEST, image - correction, image)
            last_image, last_scaled = image, scaled
            length += 1
            if tl.max(tl.abs(w), 0) > ABSORBED:
                g, resort, last_image = g + temperature * w, resort - w, last_image - w
                w, stale = tl.zeros([WIDTH], tl.float32), True
        if not met:
            level = -1
    if own == 0:
        tl.store(potential + problem * m + columns, g, mask=columns < m)
        tl.store(report + problem * 2, error)
        tl.store(report + problem * 2 + 1, n_iter)


def slabs(n: int, m: int, most: int) -> Slabs | None:
    """How to spread a problem over at most ``most`` programs, all of which run at once, or ``None`` if it is too large."""
    width, programs = _width(m), 1
    while programs * max(1, SLAB // width) < n and 2 * programs <= most:
        programs *= 2
    rows = max(4, triton.next_power_of_2(triton.cdiv(n, programs)))
    return Slabs(programs, rows) if m <= COLUMNS and rows * width <= 2 * SLAB else None


def constants(m: int, rho: float, slabs: Slabs) -> dict[str, Any]:
    """What the kernel is compiled for."""
    width = _width(m)
    memory = anderson.MEMORY if width < COLUMNS else 4
    return {
        "BALANCED": rho == math.inf,
        "PROGRAMS": slabs.programs,
        "ROWS": slabs.rows,
        "WIDTH": width,
        "SLOTS": triton.next_power_of_2(memory),
        "MEMORY": memory,
    }


def options(constants: dict[str, Any]) -> dict[str, Any]:
    """Warps that keep the matrix in registers, at most 64 of each thread; a launch that fails unless all programs fit."""
    warps = min(16, max(1, constants["ROWS"] * constants["WIDTH"] // 1024))
    return {"num_warps": warps, "launch_cooperative_grid": constants["PROGRAMS"] > 1}


def _width(m: int) -> int:
    return max(16, triton.next_power_of_2(m))


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho: float,
    mean: Tensor,
    tol: float,
    max_iter: int,
    start: Tensor | None,
    slabs: Slabs,
) -> tuple[Tensor, Tensor]:
    """Potentials on the columns ``(B, M)``, and a report ``(B, 2)``: errors and numbers of iterations.

    Args:
        cost: costs ``(B, N, M)``.
        a: weights of the rows ``(B, N)``.
        b: weights of the columns ``(B, M)``.
        eps: final temperatures ``(B,)``.
        rho: price of creating or destroying mass, infinite if it is forbidden.
        mean: mean costs ``(B,)``.
        tol: error at which to stop.
        max_iter: most iterations.
        start: potentials ``(B, M)`` to start from.
        slabs: how each problem is spread.
    """
    size, n, m = cost.shape
    settings = constants(m, rho, slabs)
    potential, report = torch.empty_like(b), b.new_empty(size, 2)
    shares = b.new_empty(size * slabs.programs, settings["WIDTH"] if slabs.programs > 1 else 0)
    sinkhorn[(size * slabs.programs,)](
        pad(cost, (0, -m % 16)).contiguous(),
        a.contiguous(),
        b.contiguous(),
        eps,
        mean,
        torch.zeros_like(b) if start is None else start.contiguous(),
        potential,
        report,
        shares,
        b.new_empty(size, shares.shape[1]),
        torch.zeros(size, dtype=torch.int32, device=b.device),
        n,
        m,
        rho,
        tol,
        max_iter,
        int(start is not None),
        **settings,
        **options(settings),
    )
    return potential, report

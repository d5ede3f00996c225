"""The whole solve of transport problems in one launch: the kernel matrix stays in registers from first to last.

The algorithm is that of :mod:`lightning_wdefense.transport.entropic.solver.potentials`, with a simpler check of the extrapolation. A small problem
is the work of one program; for a larger one, see :mod:`lightning_wdefense.transport.entropic.triton.persistent`.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lightning_wdefense.transport.entropic import constants
from lightning_wdefense.transport.entropic.triton.pairwise import ALIGNED, STRIDE
from lightning_wdefense.transport.entropic.triton.persistent import (
    COLUMNS,
    Slabs,
    add_up,
    launch_settings,
    meeting_place,
    power_of_two,
)

# In Triton's interpreter a constant on the left of a tensor may make a constant of the product: tensors come first below.
WARMEST = tl.constexpr(constants.WARMEST)
LOG_COOLING = tl.constexpr(math.log(constants.COOLING))
ENTRY = tl.constexpr(constants.ENTRY)
WARM = tl.constexpr(constants.WARM)
ABSORBED = tl.constexpr(constants.ABSORBED)
FARTHEST = tl.constexpr(constants.FARTHEST)
LONGEST = tl.constexpr(constants.LONGEST)
PATIENCE = tl.constexpr(constants.PATIENCE)
REHEATINGS = tl.constexpr(constants.REHEATINGS)
TINY = tl.constexpr(constants.TINY)
FLOOR = tl.constexpr(constants.FLOOR)
RIDGE = tl.constexpr(constants.RIDGE)

GROWTH = tl.constexpr(3.0)
"""Growth of the error, from the smallest one, at which an extrapolation has gone astray."""


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
def solved(gram, right, slots, MEMORY: tl.constexpr):
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
def extrapolate(residuals, images, gram, last_scaled, last_image, scaled, image, length, slots, MEMORY: tl.constexpr):
    """Anderson's next point, and the history with one more difference, if there is a last step to differ from.

    As in :mod:`lightning_wdefense.transport.entropic.solver.anderson`, but a point too far away to be believed is drawn towards the image.
    """
    diagonal = slots[:, None] == slots[None, :]
    now = (slots == length % MEMORY) & (length > 0)
    step = scaled - last_scaled
    residuals = tl.where(now[:, None], step[None, :], tl.where(length > 0, residuals, 0.0))
    images = tl.where(now[:, None], (image - last_image)[None, :], images)
    products = tl.sum(residuals * step[None, :], 1)
    gram = tl.where(length > 0, gram, tl.where(diagonal, 1.0, 0.0))
    gram = tl.where(now[:, None], products[None, :], tl.where(now[None, :], products[:, None], gram))
    system = tl.where(diagonal, gram * (1.0 + RIDGE) + TINY, gram)
    mixture = solved(system, tl.sum(residuals * scaled[None, :], 1), slots, MEMORY)
    correction = tl.sum(images * mixture[:, None], 0)
    correction = tl.where(tl.abs(correction) < float("inf"), correction, 0.0)
    if tl.max(tl.abs(image - correction), 0) > FARTHEST:
        correction = correction * tl.minimum(1.0 / tl.maximum(tl.max(tl.abs(correction), 0), TINY) * LONGEST, 1.0)
    return residuals, images, gram, image - correction


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
    BALANCED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMORY: tl.constexpr,
):
    """Potentials of all problems, ``PROGRAMS`` programs for each, and a report: the error and the number of iterations."""
    problem, own = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    rows, columns, slots = own * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, SLOTS)
    # So that a thread loads, and then keeps, four columns at once: half the registers go to the vectors otherwise.
    stride = tl.cdiv(m, STRIDE) * STRIDE
    cost += problem.to(tl.int64) * n * stride
    shares, totals, arrived = shares + problem * PROGRAMS * WIDTH, totals + problem * WIDTH, arrived + problem
    eps, mean = tl.load(eps + problem), tl.load(mean + problem)
    a = tl.load(a + problem * n + rows, mask=rows < n, other=0.0)
    b = tl.load(b + problem * m + columns, mask=columns < m, other=0.0)
    kept = b > 0
    log_b = tl.where(kept, tl.log(tl.where(kept, b, 1.0)), -float("inf"))

    levels = tl.floor(tl.log(tl.maximum(mean * WARMEST / eps, 1.0)) / LOG_COOLING).to(tl.int32)
    level = tl.where(warm > 0, 0, levels)
    warmest = level
    reheatings = 0
    began = 0  # iterations before those of the level
    untried = warm > 0  # whether the error at the given potential is still unknown
    g = tl.load(start + problem * m + columns, mask=kept & (warm > 0), other=0.0)
    w = tl.zeros([WIDTH], tl.float32)
    resort = w  # the plain step from the best point of the level
    residuals, images = tl.zeros([SLOTS, WIDTH], tl.float32), tl.zeros([SLOTS, WIDTH], tl.float32)
    gram = tl.zeros([SLOTS, SLOTS], tl.float32)
    last_scaled, last_image = w, w
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
        astray = not (error <= best * GROWTH)
        poor = untried and not (error < WARM)
        untried = False
        if astray:
            w = resort
        stuck = (n_iter - began == PATIENCE) & (level == warmest) & (reheatings < REHEATINGS) and not (error <= ENTRY)
        done = (error <= tl.where(level > 0, tl.maximum(tol, ENTRY), tol)) | (n_iter >= max_iter)
        if done | stuck | poor:
            g = tl.where(poor, 0.0, g + temperature * w)
            level = tl.where(poor, levels, tl.where(done, level - 1, level + 1))
            warmest = tl.where(done, warmest, level)
            reheatings += tl.where(done | poor, 0, 1)
            w, resort = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
            best, stale, length, began = float("inf"), True, 0, n_iter
        elif astray:
            best, length = float("inf"), 0
        else:
            image, scaled = w + residual, residual * tl.sqrt(b)
            resort, best = tl.where(error < best, image, resort), tl.minimum(error, best)
            residuals, images, gram, w = extrapolate(
                residuals, images, gram, last_scaled, last_image, scaled, image, length, slots, MEMORY
            )
            last_scaled, last_image, length = scaled, image, length + 1
        if tl.max(tl.abs(w), 0) > ABSORBED:
            g, resort, last_image = g + temperature * w, resort - w, last_image - w
            w, stale = tl.zeros([WIDTH], tl.float32), True
        if not met:
            level = -1
    if own == 0:
        tl.store(potential + problem * m + columns, g, mask=columns < m)
        tl.store(report + problem * 2, error)
        tl.store(report + problem * 2 + 1, n_iter)


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
    found, report = torch.empty_like(b), b.new_empty(len(b), 2)
    a, b, eps, mean = (each.contiguous() for each in (a, b, eps, mean))
    start = None if start is None else start.contiguous()
    padded = pad(cost, (0, -cost.shape[-1] % ALIGNED)).contiguous()
    launch(padded, a, b, eps, rho, mean, tol, max_iter, start, slabs, found, report)
    return found, report


def launch(
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
    found: Tensor,
    report: Tensor,
) -> None:
    """As :func:`solve`, of contiguous tensors, with costs in rows of a multiple of :data:`~lightning_wdefense.transport.entropic.triton.pairwise.ALIGNED` entries.

    ``found`` and ``report`` are where the results go.
    """
    (size, n), m = a.shape, b.shape[1]
    sinkhorn[(size * slabs.programs,)](
        # Some tensor in the place of a start that there is not: it is not read.
        *(cost, a, b, eps, mean, b if start is None else start, found, report),
        *meeting_place(size, slabs, b.device),
        *(n, m, rho, tol, max_iter, int(start is not None)),
        **settings(slabs, rho),
    )


def settings(slabs: Slabs, rho: float) -> dict[str, Any]:
    """What the kernel is compiled for."""
    memory = constants.MEMORY if slabs.columns < COLUMNS else 4
    history = {"SLOTS": power_of_two(memory), "MEMORY": memory}
    return {"BALANCED": rho == math.inf, **history, **launch_settings(slabs)}

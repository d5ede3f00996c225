"""Dual potentials of entropic transport, by annealing from a high temperature down to the requested one.

All functions take one problem, costs ``(N, M)`` and a temperature that is a number, or a batch of them, costs ``(B, N, M)`` and
temperatures ``(B, 1)``. A problem of a batch that has converged waits for the others, so that it ends as it would alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic import triton
from lightning_wdefense.transport.entropic.constants import COOLING, ENTRY, PATIENCE, REHEATINGS, WARM, WARMEST
from lightning_wdefense.transport.entropic.solver.iteration import Iteration
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel


class Solution(NamedTuple):
    """Potentials of a problem or of a batch: ``f`` the exact answer to ``g``."""

    f: Tensor
    g: Tensor
    n_iter: int
    error: Tensor


def solve(
    kernel: GibbsKernel,
    eps: float | Tensor,
    *,
    mean: float | Tensor,
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
) -> Solution:
    """Potentials of the transport of the rows to the columns, to a relative marginal error of ``tol``.

    On a GPU, Triton finds them in one launch where it can, and what follows is their check.

    At a high temperature the problem is easy, and its solution is a good start for the next one. A problem that needs fewer
    temperatures than others of its batch stays at its first one, so that it takes the same path as it would alone.

    Args:
        kernel: the kernel of the problem, which is the plan of the potentials afterwards.
        eps: final temperature, a number or ``(B, 1)``.
        mean: the mean cost, a number or ``(B, 1)``: the annealing starts below it.
        tol: error at which to stop.
        max_iter: most iterations, those of the annealing included.
        start: potential on ``y`` to start from.
    """
    cost, a, b, rho = kernel.cost, kernel.a, kernel.b, kernel.rho
    iteration = Iteration(kernel, b)
    levels = levels_above(mean, eps)
    if kernel.holds_all_rows and triton.available(a.device) and not cost.too_large(a):
        found = triton.potential(cost.rows().contiguous(), a, b, eps, rho, mean, tol, max_iter, start)
        start = start if found is None else found
    g, n_iter = torch.zeros_like(b), 0
    if start is not None and rho is None:  # Only differences count, and they would drown beside a large constant.
        start = start - (b * start).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    if start is not None and iteration.error_at(start, eps) < WARM:
        g, levels = start, 0 if isinstance(levels, int) else torch.zeros_like(levels)
    elif rho is not None:  # Between clouds so far apart that nothing is transported, only logarithms are left.
        g = iteration.log_step(g, eps)
    level = warmest = levels if isinstance(levels, int) else int(levels.max())
    temperature: float | Tensor
    level_tol: float | Tensor
    reheatings = 0
    while True:
        if isinstance(levels, int):
            temperature, level_tol = eps * COOLING**level, max(tol, ENTRY) if level else tol
        else:
            height = levels.clamp(max=level)
            temperature = eps * COOLING**height
            level_tol = b.new_full(b.shape[:1], tol).masked_fill(height[:, 0] > 0, max(tol, ENTRY))
        patience = PATIENCE if level == warmest and reheatings < REHEATINGS else max_iter
        g, error, n = iteration.run(g, temperature, level_tol, max(1, max_iter - n_iter), patience)
        n_iter += n
        stuck = error > ENTRY
        if n == patience and n_iter < max_iter and bool(stuck.any()):
            # Groups of points that exchange no mass at this temperature settle their balance at a higher one.
            levels = levels + 1 if isinstance(levels, int) else levels + stuck[:, None]
            level = warmest = levels if isinstance(levels, int) else int(levels.max())
            reheatings += 1
        elif level == 0:
            break
        else:
            level -= 1
    f = kernel.row_potential()
    if kernel.kept is not None:
        g = torch.where(b > 0, g, kernel.column_potential(f))
    return Solution(f, g, n_iter, error)


def levels_above(mean: float | Tensor, eps: float | Tensor) -> int | Tensor:
    """How many temperatures come before the final one.

    Args:
        mean: the mean cost, a number or ``(B, 1)``.
        eps: the final temperature, likewise.
    """
    if isinstance(mean, Tensor):
        return (WARMEST * mean / eps).clamp(min=1).log().div(math.log(COOLING)).floor()
    return math.floor(math.log(max(1.0, WARMEST * mean / eps)) / math.log(COOLING))

"""A batch of small transport problems in one launch, one program for each: nobody waits for anybody."""

from __future__ import annotations

import triton
from torch import Tensor

from lightning_wdefense.transport.triton import persistent

SIZE = 128
"""Most rows and columns: the kernel matrix stays in the registers of one multiprocessor."""


def fits(cost: Tensor) -> bool:
    """Whether costs ``(B, N, M)`` are small."""
    return max(cost.shape[1:]) <= SIZE


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
) -> tuple[Tensor, Tensor]:
    """Potentials and a report, as :func:`persistent.solve`."""
    rows = max(16, triton.next_power_of_2(cost.shape[1]))
    return persistent.solve(cost, a, b, eps, rho, mean, tol, max_iter, start, persistent.Slabs(1, rows))

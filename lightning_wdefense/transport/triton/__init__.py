"""The Sinkhorn iteration as Triton kernels, for NVIDIA GPUs: a whole solve in one launch.

They are only ever a quicker way to good potentials, in float32. The PyTorch solver checks what they return and goes on from
there, so a kernel that fails costs time but no accuracy. Written without a GPU: they ran in Triton's interpreter and compile
for sm_90, but nothing here has run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings

import torch
from torch import Tensor

__all__ = ["available", "potential"]

SMALL = 128
"""Most rows and columns of a problem that one program solves by itself."""

_failed: set[str] = set()
"""Kinds of problems whose kernel could not be compiled or launched: it is not tried again."""


def available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device: on a GPU, or anywhere if ``TRITON_INTERPRET`` is set."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def potential(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    rho: float | None,
    mean: float | Tensor,
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
) -> Tensor | None:
    """Potentials on the columns ``(..., M)``, zero for columns of no weight, or ``None`` if no kernel can find them.

    Args:
        cost: costs ``(N, M)`` or ``(B, N, M)``.
        a: weights of the rows ``(..., N)``.
        b: weights of the columns ``(..., M)``.
        eps: final temperature, a number or ``(B, 1)``.
        rho: price of creating or destroying mass; ``None`` or infinite if it is forbidden.
        mean: mean cost, a number or ``(B, 1)``: the annealing starts below it.
        tol: marginal error at which to stop.
        max_iter: most iterations, those of the annealing included.
        start: potential ``(..., M)`` to start from.
    """
    kind = "small" if max(cost.shape[-2:]) <= SMALL else "large"
    if cost.dtype != torch.float32 or kind in _failed or not available(cost.device):
        return None
    try:
        # Here, not above: these need Triton, which is not to be had everywhere.
        from lightning_wdefense.transport.triton import persistent, small

        batched = cost.ndim == 3
        costs, rows, columns = (each if batched else each.unsqueeze(0) for each in (cost, a, b))
        first = start if batched or start is None else start.unsqueeze(0)
        size, n, m = costs.shape
        slabs = persistent.spread(n, m, size, cost.device)
        if slabs is None:
            return None
        temperatures, means = (_per_problem(each, columns) for each in (eps, mean))
        price = math.inf if rho is None else rho
        with torch.cuda.device_of(cost):
            found, _ = small.solve(costs, rows, columns, temperatures, price, means, tol, max_iter, first, slabs)
    except Exception as error:  # a compiler and a driver may raise anything
        _failed.add(kind)
        message = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"The Triton kernel for {kind} transport problems failed ({type(error).__name__}: {message}); "
            "PyTorch solves them from now on, which is slower.",
            stacklevel=2,
        )
        return None
    return found if batched else found[0]


def _per_problem(value: float | Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1) if isinstance(value, Tensor) else like.new_full((len(like),), value)

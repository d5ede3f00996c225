"""The Sinkhorn iteration as Triton kernels, for NVIDIA GPUs: a whole solve in one launch.

They are only ever a quicker way to good potentials, in float32. The PyTorch solver checks what they return and goes on from
there, so a kernel that fails costs time but no accuracy. They were tried on an H100 (``benchmarks/results/gpu_h100``) and run in
Triton's interpreter. They need Triton 3.4, which comes with PyTorch 2.8, or later; with earlier ones PyTorch does everything.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from packaging.version import Version
from torch import Tensor

__all__ = ["available", "fits", "pairwise_costs", "potential", "potentials"]

T = TypeVar("T")

SMALL = 128
"""Most rows and columns of a problem that one program solves by itself."""

OLDEST = Version("3.4")
"""The first release of Triton that compiles all kernels."""

_failed: set[str] = set()
"""Kinds of problems whose kernel could not be compiled or launched: it is not tried again."""


def available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device: on a GPU, or anywhere if ``TRITON_INTERPRET`` is set."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return (device.type == "cuda" or interpreted) and supported()


@functools.cache
def supported() -> bool:
    """Whether a Triton is installed that compiles the kernels."""
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= OLDEST


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
    if cost.dtype != torch.float32 or not available(cost.device):
        return None

    def find() -> Tensor | None:
        # Here, not above: these need Triton, which is not to be had everywhere.
        from lightning_wdefense.transport.entropic.triton import persistent, small

        batched = cost.ndim == 3
        costs, rows, columns = (each if batched else each.unsqueeze(0) for each in (cost, a, b))
        first = start if batched or start is None else start.unsqueeze(0)
        size, n, m = costs.shape
        slabs = persistent.spread(n, m, size, cost.device)
        if slabs is None:
            return None
        temperatures, means = (_per_problem(each, columns) for each in (eps, mean))
        price = math.inf if rho is None else rho
        found, _ = small.solve(costs, rows, columns, temperatures, price, means, tol, max_iter, first, slabs)
        return found if batched else found[0]

    return _launched(_kind(*cost.shape[-2:]), cost, find)


def fits(n: int, m: int, size: int, device: torch.device) -> bool:
    """Whether :func:`potentials` can solve ``size`` problems ``(N, M)``, and has not failed."""
    if not available(device) or f"stacked {_kind(n, m)}" in _failed:
        return False
    from lightning_wdefense.transport.entropic.triton import persistent

    return bool(persistent.portions(n, m, size, device))


def pairwise_costs(x: Tensor, y: Tensor, p: int) -> Tensor | None:
    """``|x - y|^p / p`` between points ``(B, N, D)`` and ``(B, M, D)`` in float32, ``(B, N, M)``, for :func:`potentials`."""

    def find() -> Tensor:
        from lightning_wdefense.transport.entropic.triton import pairwise

        return pairwise.pairwise_costs(x, y, p)

    return _launched(f"stacked {_kind(x.shape[1], y.shape[1])}", x, find)


def potentials(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho: float | None,
    mean: Tensor,
    *,
    tol: float,
    self_tol: float,
    max_iter: int,
    start: Tensor | None,
    between: int,
) -> tuple[Tensor, Tensor] | None:
    """Potentials ``(S, M)`` of problems that :func:`fits`, and a report ``(S, 2)``: errors and numbers of iterations.

    Args:
        cost: costs ``(S, N, M)`` from :func:`pairwise_costs`.
        a: weights of the rows ``(S, N)``.
        b: weights of the columns ``(S, M)``.
        eps: temperatures ``(S,)``.
        rho: price of creating or destroying mass, or ``None``.
        mean: mean costs of the first problems: the annealing starts below them.
        tol: marginal error at which to stop.
        self_tol: the same for transports of a measure to itself.
        max_iter: most iterations.
        start: potentials of the first problems to start from.
        between: how many are these: the others are of a measure to itself.
    """

    def find() -> tuple[Tensor, Tensor]:
        from lightning_wdefense.transport.entropic.triton import persistent, small, symmetric

        (size, n), m, price = a.shape, b.shape[1], math.inf if rho is None else rho
        rows, columns = a.contiguous(), b.contiguous()
        found, report = torch.empty_like(columns), b.new_empty(size, 2)
        for part, slabs in persistent.portions(n, m, between, b.device):
            first = None if start is None else start[part].contiguous()
            problems = cost[part], rows[part], columns[part], eps[part], price, mean[part], tol, max_iter, first
            small.launch(*problems, slabs, found[part], report[part])
        for own, slabs in persistent.portions(n, m, size - between, b.device):
            part = slice(between + own.start, between + own.stop)
            within = cost[part], rows[part], eps[part], price, self_tol, max_iter
            symmetric.launch(*within, slabs, found[part], report[part])
        return found, report

    return _launched(f"stacked {_kind(a.shape[1], b.shape[1])}", cost, find)


def _kind(n: int, m: int) -> str:
    return "small" if max(n, m) <= SMALL else "large"


def _launched(kind: str, like: Tensor, launch: Callable[[], T]) -> T | None:
    """What a launch on the device of a tensor returns, or ``None``, with one warning, if kernels of this kind fail."""
    if kind in _failed:
        return None
    try:
        with torch.cuda.device_of(like):
            return launch()
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:  # a compiler and a driver may raise anything
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise  # what cannot be recorded may well run
        _failed.add(kind)
        message = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"The Triton kernel for {kind} transport problems failed ({type(error).__name__}: {message}); "
            "PyTorch solves them from now on, which is slower.",
            stacklevel=3,
        )
        return None


def _per_problem(value: float | Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1) if isinstance(value, Tensor) else like.new_full((len(like),), value)

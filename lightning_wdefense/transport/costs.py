"""Ground costs: what it costs to move a unit of mass from a point to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_wdefense.transport.measures import Measure
from lightning_wdefense.transport.options import Cost


def ground_cost(x: Measure, y: Measure, p: int, cost: Cost | None, *, same: bool = False) -> Tensor:
    """Cost ``(B, N, M)`` between the points: ``|x - y|^p / p``, or the caller's own, made by :func:`checked_cost`."""
    return euclidean_cost(x.points, y.points, p, same=same) if cost is None else cost(x.points, y.points)


def checked_cost(cost: Cost, *, batched: bool) -> Cost:
    """The caller's cost as one of batches ``(B, N, D)`` and ``(B, M, D)``, with an error if it does not return a cost."""

    def checked(x: Tensor, y: Tensor) -> Tensor:
        matrix = cost(x, y) if batched else cost(x[0], y[0])
        shape = (len(x), x.shape[1], y.shape[1]) if batched else (x.shape[1], y.shape[1])
        if not isinstance(matrix, Tensor):
            raise TypeError(f"cost(x, y) must return a torch.Tensor, got {type(matrix).__name__}.")
        if matrix.shape != shape:
            raise ValueError(
                f"cost(x, y) must return a cost for each pair of points, shape {shape}; got {tuple(matrix.shape)}."
            )
        if not bool(matrix.isfinite().all()):
            raise ValueError("cost(x, y) returned NaN or infinite values.")
        return matrix.to(x.dtype).reshape(len(x), x.shape[1], y.shape[1])

    return checked


def euclidean_cost(x: Tensor, y: Tensor, p: int, *, same: bool = False) -> Tensor:
    """``|x - y|^p / p`` for ``p`` in 1, 2. ``same`` says that both clouds are one, so that the diagonal is zero."""
    if p == 2:
        return _HalfSquaredDistance.apply(x, y, same)
    # Differences, not products: the square root would turn their rounding of 1e-7 into 3e-4 where points coincide.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def label_disagreement(x_labels: Tensor, y_labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Total variation distance ``(B, N, M)`` between labels: for integer ones, 1 where they differ and 0 elsewhere."""
    if x_labels.is_floating_point():
        return 0.5 * torch.cdist(x_labels, y_labels, p=1)
    return (x_labels[:, :, None] != y_labels[:, None, :]).to(dtype)


def mean_cost(cost: Tensor, x: Measure, y: Measure) -> Tensor:
    """Mean cost ``(B,)`` of a random pair, each point drawn with its weight; a constant for autograd."""
    cost, a, b = cost.detach(), x.weights.detach(), y.weights.detach()
    total = ((cost * b[:, None, :]).sum(-1) * a).sum(-1)
    return total / (a.sum(-1) * b.sum(-1))


class _HalfSquaredDistance(torch.autograd.Function):
    """``|x - y|^2 / 2`` with products in float64, forward and backward.

    The products cancel almost entirely. In float32 they would lose four digits on raw features, in TF32 or under
    autocast all of them, and the global switches that forbid those are not ours to flip; autocast leaves float64 alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, same: bool) -> Tensor:
        ctx.save_for_backward(x, y)
        wide_x, wide_y = _centred(x, y)
        cost = 0.5 * (wide_x.square().sum(-1)[:, :, None] + wide_y.square().sum(-1)[:, None, :])
        cost = (cost - wide_x @ wide_y.mT).clamp_(min=0).to(x.dtype)
        if same:
            cost.diagonal(dim1=-2, dim2=-1).zero_()
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = _centred(*ctx.saved_tensors)
        wide = grad.to(x.dtype)
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide.sum(-1)[:, :, None] * x - wide @ y).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_y = (wide.sum(-2)[:, :, None] * y - wide.mT @ x).to(grad.dtype)
        return grad_x, grad_y, None


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds around the second one's mean, in float64 where the device has it."""
    dtype = x.dtype if x.device.type == "mps" else torch.float64
    x, y = x.to(dtype), y.to(dtype)
    centre = y.mean(-2, keepdim=True)
    return x - centre, y - centre

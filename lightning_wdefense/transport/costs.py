"""Ground costs: what it costs to move a unit of mass from a point to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_wdefense.transport.measures import Measure
from lightning_wdefense.transport.options import Cost
from lightning_wdefense.transport.workspace import Workspace

Rows = Callable[..., Tensor]

STORED = {"cpu": 2**28, "cuda": 2**31}
"""Entries up to which a cost is stored, by type of device; a larger one is made anew whenever it is needed."""

BLOCK = 2**18
"""Entries that are made at once, so that they stay in the cache of a core."""

ROUNDING = 1e-3
"""Error of a cost, in units of the temperature, above which its products are taken in float64."""


@dataclass(frozen=True)
class GroundCost:
    """Cost ``(N, M)`` or ``(B, N, M)`` between points, made block by block of rows or stored.

    Attributes:
        shape: of the whole.
        rows: ``(part, out=None)`` makes the cost of a slice of the rows, or shows that part of what is stored.
        lazy: whether ``rows`` makes it.
        distances: for ``p = 1`` the distances of a slice of the rows, by which the gradient divides.
        zero_diagonal: whether it is the cost within one cloud, zero from each point to itself.
    """

    shape: tuple[int, ...]
    rows: Rows
    lazy: bool = True
    distances: Rows | None = None
    zero_diagonal: bool = False

    def parts(self, entries: int = BLOCK) -> list[slice]:
        """Slices of the rows that are made at once."""
        n, m = self.shape[-2:]
        step = n if len(self.shape) == 3 else max(16, entries // m)
        return [slice(start, min(n, start + step)) for start in range(0, n, step)]

    def average(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean cost ``(...)`` of a random pair, each point drawn with its weight."""
        means = (((self.rows(part) @ b.unsqueeze(-1)).squeeze(-1) * a[..., part]).sum(-1) for part in self.parts())
        return sum(means, a.new_zeros(())) / (a.sum(-1) * b.sum(-1))

    def too_large(self, device: torch.device) -> bool:
        """Whether a matrix of this shape is not stored on the device."""
        return self.shape[-2] * self.shape[-1] > STORED.get(device.type, STORED["cpu"])

    def stored(self, like: Tensor, work: Workspace, name: str) -> GroundCost:
        """The same as a matrix in a buffer of the workspace, unless that would be too large."""
        if not self.lazy or self.too_large(like.device):
            return self
        matrix = work.empty(name, self.shape, like)
        for part in [slice(0, self.shape[-2])] if like.is_cuda else self.parts():
            self.rows(part, matrix[..., part, :])
        return replace(self, rows=lambda part: matrix[..., part, :], lazy=False)


def matrix_cost(matrix: Tensor) -> GroundCost:
    """A cost that is given as a matrix."""
    return GroundCost(tuple(matrix.shape), lambda part: matrix[..., part, :], lazy=False)


def half_squared_distance(x: Tensor, y: Tensor, eps: float) -> GroundCost:
    """``|x - y|^2 / 2`` between points ``(..., N, D)`` and ``(..., M, D)`` near the origin.

    One product of the points with their squares appended. Its terms cancel almost entirely, so it is taken in float64 where
    float32 is too coarse beside ``eps``.
    """
    dtype, shape = x.dtype, (*x.shape[:-1], y.shape[-2])
    squares = [0.5 * torch.linalg.vector_norm(points, dim=-1, keepdim=True).square() for points in (x, y)]
    if dtype == torch.float32 and x.device.type != "mps":
        largest = max(float(square.max()) for square in squares)
        if torch.finfo(dtype).eps * largest > ROUNDING * eps:
            x, y = x.double(), y.double()
            squares = [0.5 * points.square().sum(-1, keepdim=True) for points in (x, y)]
    ones = [torch.ones_like(square) for square in squares]
    left = torch.cat([x, squares[0], ones[0]], -1)
    right = torch.cat([y.neg(), ones[1], squares[1]], -1).mT

    def rows(part: slice, out: Tensor | None = None) -> Tensor:
        if left.dtype == dtype:
            return torch.matmul(left[..., part, :], right, out=out)
        cost = (left[..., part, :] @ right).to(dtype)
        return cost if out is None else out.copy_(cost)

    return GroundCost(shape, rows)


def distance(x: Tensor, y: Tensor) -> GroundCost:
    """``|x - y|`` between points ``(..., N, D)`` and ``(..., M, D)``."""

    # Differences, not products: the square root would turn their rounding of 1e-7 into 3e-4 where points coincide.
    def rows(part: slice, out: Tensor | None = None) -> Tensor:
        cost = torch.cdist(x[..., part, :], y, compute_mode="donot_use_mm_for_euclid_dist")
        return cost if out is None else out.copy_(cost)

    return GroundCost((*x.shape[:-1], y.shape[-2]), rows, distances=rows)


def within_a_cloud(cost: GroundCost) -> GroundCost:
    """The cost between the points of one cloud: zero from each to itself, whatever the rounding."""

    def rows(part: slice, out: Tensor | None = None) -> Tensor:
        block = cost.rows(part, out)
        block[..., part].diagonal(dim1=-2, dim2=-1).zero_()
        return block

    return replace(cost, rows=rows, zero_diagonal=True)


def with_labels(cost: GroundCost, x: Measure, y: Measure, price: float) -> GroundCost:
    """The cost with ``price`` added where the labels of the points differ."""
    x_labels, y_labels = x.labels, y.labels
    if x_labels is None or y_labels is None:
        raise ValueError("Both measures need labels.")

    def rows(part: slice, out: Tensor | None = None) -> Tensor:
        some = x_labels[..., part, :] if x_labels.is_floating_point() else x_labels[..., part]
        block = cost.rows(part)
        return torch.add(block, label_disagreement(some, y_labels, block.dtype), alpha=price, out=out)

    return replace(cost, rows=rows, lazy=True)


def label_disagreement(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Total variation distance ``(..., N, M)`` between labels: for integer ones, 1 where they differ and 0 elsewhere."""
    if x.is_floating_point():
        return 0.5 * torch.cdist(x, y, p=1)
    return (x.unsqueeze(-1) != y.unsqueeze(-2)).to(dtype)


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

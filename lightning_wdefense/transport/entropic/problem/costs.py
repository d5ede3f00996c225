"""Ground costs: the cost of moving a unit of mass from one point to another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest
from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.entropic.options import Cost
from lightning_wdefense.transport.entropic.problem.workspace import Workspace

Rows = Callable[..., Tensor]

STORED = {"cpu": 2**28, "cuda": 2**31}
"""Number of entries up to which a cost matrix is stored, by type of device. A larger one is recomputed whenever it is needed."""

SHARE = 0.25
"""Share of a GPU's free memory up to which a cost is stored. Its kernel takes as much memory, and so do the gradients."""

UNASKED = 2**26
"""Size in bytes up to which the free memory of a GPU is not queried, because the query takes time."""

BLOCK = 2**18
"""Number of entries that are computed at once, so that they stay in the cache of a core."""

ROUNDING = 1e-3
"""Error of a cost, in units of the temperature, above which its products are computed in float64."""


@dataclass(frozen=True)
class GroundCost:
    """Cost ``(N, M)`` or ``(B, N, M)`` between points: a matrix, made block by block of rows or stored, and two offsets.

    Attributes:
        shape: of the whole.
        matrix: ``(part, out=None)`` makes the matrix for a slice of the rows, or shows that part of what is stored.
        row: added to all costs of a row, ``(..., N)``.
        column: added to all costs of a column, ``(..., M)``.
        lazy: whether ``matrix`` makes it.
        distances: for ``p = 1`` the distances of a slice of the rows, by which the gradient divides.
        points: the two clouds, if the cost is their half squared distance and nothing else.
    """

    shape: tuple[int, ...]
    matrix: Rows
    row: Tensor | None = None
    column: Tensor | None = None
    lazy: bool = True
    distances: Rows | None = None
    points: tuple[Tensor, Tensor] | None = None

    def rows(self, part: slice = slice(None)) -> Tensor:
        """The cost of a slice of the rows."""
        block = self.matrix(part)
        if self.row is not None and self.column is not None:
            block = block + self.row[..., part].unsqueeze(-1) + self.column.unsqueeze(-2)
        return block

    def parts(self) -> list[slice]:
        """Slices of the rows that are made at once."""
        n, m = self.shape[-2:]
        step = n if len(self.shape) == 3 else max(16, BLOCK // m)
        return [slice(start, min(n, start + step)) for start in range(0, n, step)]

    def average(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean cost ``(...)`` of a random pair, each point drawn with its weight."""
        means = (((self.rows(part) @ b.unsqueeze(-1)).squeeze(-1) * a[..., part]).sum(-1) for part in self.parts())
        return sum(means, a.new_zeros(())) / (a.sum(-1) * b.sum(-1))

    def too_large(self, like: Tensor) -> bool:
        """Whether a matrix of this shape, on the device and in the dtype of a tensor, is too large to be stored.

        One beside a cost that is stored may take more of the memory that is left, so that both or neither are.
        """
        return too_large(self.shape, like, SHARE if self.lazy else 2 * SHARE)

    def stored(self, like: Tensor, work: Workspace, name: str) -> GroundCost:
        """The same with its matrix in a buffer of the workspace, unless that would be too large."""
        if not self.lazy or self.too_large(like):
            return self
        matrix = work.empty(name, self.shape, like)
        for part in [slice(0, self.shape[-2])] if like.is_cuda else self.parts():
            self.matrix(part, matrix[..., part, :])
        return replace(self, matrix=lambda part: matrix[..., part, :], lazy=False)


def too_large(shape: Sequence[int], like: Tensor, share: float = SHARE) -> bool:
    """Whether matrices ``(..., N, M)`` on the device and in the dtype of a tensor are too large to be stored."""
    device = like.device
    if shape[-2] * shape[-1] > STORED.get(device.type, STORED["cpu"]):
        return True
    size = math.prod(shape) * like.element_size()
    return device.type == "cuda" and size > UNASKED and size > share * _free(device)


def _free(device: torch.device) -> int:
    """Bytes of a GPU's memory that are unused, including those that PyTorch reserves for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def matrix_cost(matrix: Tensor) -> GroundCost:
    """A cost that is given as a matrix."""
    return GroundCost(tuple(matrix.shape), lambda part: matrix[..., part, :], lazy=False)


def half_squared_distance(source: Measure, target: Measure, eps: float) -> GroundCost:
    """``|x - y|^2 / 2`` between the points ``(..., N, D)`` and ``(..., M, D)`` of measures near the origin.

    The squares are offsets, the matrix is the negative product. They cancel almost entirely, so that they are taken in float64
    where float32 is too coarse beside ``eps``.
    """
    x, y = source.points, target.points
    dtype, shape = x.dtype, (*x.shape[:-1], y.shape[-2])
    row, column = half_squares(x), half_squares(y)
    if dtype == torch.float32 and widest(x.device) != dtype:
        weighty = torch.where(source.weights > 0, row, 0), torch.where(target.weights > 0, column, 0)
        largest = max(float(squares.max()) if squares.numel() else 0.0 for squares in weighty)
        if torch.finfo(dtype).eps * largest > ROUNDING * eps:
            source, target = (each._replace(points=each.points.double()) for each in (source, target))
            return _wide(half_squared_distance(source, target, eps), dtype)
    transposed, product = y.mT, torch.addmm if x.ndim == 2 else torch.baddbmm

    def matrix(part: slice, out: Tensor | None = None) -> Tensor:
        some = x[..., part, :]
        out = some.new_empty(*some.shape[:-1], shape[-1]) if out is None else out
        return product(out, some, transposed, beta=0, alpha=-1, out=out)

    return GroundCost(shape, matrix, row, column, points=(x, y))


def half_squares(points: Tensor) -> Tensor:
    """Half the squared lengths ``(..., N)`` of points ``(..., N, D)``."""
    return 0.5 * torch.linalg.vector_norm(points, dim=-1).square()


def _wide(cost: GroundCost, dtype: torch.dtype) -> GroundCost:
    """A cost that is computed in float64, without offsets: they are large where that is needed."""

    def matrix(part: slice, out: Tensor | None = None) -> Tensor:
        block = cost.rows(part).clamp_(min=0)
        return block.to(dtype) if out is None else out.copy_(block)

    return GroundCost(cost.shape, matrix)


def distance(x: Tensor, y: Tensor) -> GroundCost:
    """``|x - y|`` between points ``(..., N, D)`` and ``(..., M, D)``."""

    # Differences, not products: the square root would turn their rounding of 1e-7 into 3e-4 where points coincide.
    def matrix(part: slice, out: Tensor | None = None) -> Tensor:
        cost = torch.cdist(x[..., part, :], y, compute_mode="donot_use_mm_for_euclid_dist")
        return cost if out is None else out.copy_(cost)

    return GroundCost((*x.shape[:-1], y.shape[-2]), matrix, distances=matrix)


def within_a_cloud(cost: GroundCost, first: int = 0) -> GroundCost:
    """The cost between the points of one cloud: exactly zero from each point to itself.

    Args:
        cost: the cost, its rows those of the points from ``first`` on.
        first: number of the first point that has a row.
    """

    def matrix(part: slice, out: Tensor | None = None) -> Tensor:
        block = cost.matrix(part, out)
        start, stop, _ = part.indices(cost.shape[-2])
        columns = slice(first + start, first + stop)
        diagonal = block[..., columns].diagonal(dim1=-2, dim2=-1)
        if cost.row is None or cost.column is None:
            diagonal.zero_()
        else:
            torch.add(cost.row[..., part], cost.column[..., columns], out=diagonal).neg_()
        return block

    return replace(cost, matrix=matrix)


def with_labels(cost: GroundCost, x: Measure, y: Measure, price: float) -> GroundCost:
    """The cost with ``price`` added where the labels of the points differ."""
    x_labels, y_labels = x.labels, y.labels
    if x_labels is None or y_labels is None:
        raise ValueError("Both measures need labels.")

    def matrix(part: slice, out: Tensor | None = None) -> Tensor:
        some = x_labels[..., part, :] if x_labels.is_floating_point() else x_labels[..., part]
        block = cost.matrix(part)
        return torch.add(block, label_disagreement(some, y_labels, block.dtype), alpha=price, out=out)

    return replace(cost, matrix=matrix, lazy=True, points=None)


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

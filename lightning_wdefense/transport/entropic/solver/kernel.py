"""The kernel ``exp((g - C) / eps)`` of a transport problem, in blocks of rows that stay in the cache.

In the kernel domain a Sinkhorn pass is a product of a matrix and a vector, where one in the log domain takes the exponential
of every entry. A kernel that is too large to be stored is made anew, block by block, in every pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.constants import FLOOR
from lightning_wdefense.transport.entropic.problem.costs import GroundCost
from lightning_wdefense.transport.entropic.problem.workspace import Workspace

CACHED = 2**18
"""Number of entries of a stored block. A pass reads it twice, the second time from the cache of a core."""

STREAMED = {"cpu": 2**18, "cuda": 2**26}
"""Number of entries of a block that is recomputed in every pass, by type of device."""


class _Block(NamedTuple):
    rows: slice
    kernel: Tensor
    transposed: Tensor
    a: Tensor
    sums: Tensor
    u: Tensor
    top: Tensor


class GibbsKernel:
    """The plan ``diag(u) K diag(v)`` at a potential on ``y``, its rows always exact.

    ``K = b exp((g - C) / eps)`` with the largest entry of each row scaled to one, and ``v = exp(w)``: the potential is
    ``g + eps w``. ``u`` follows from the constraint on the rows, balanced or with the price ``rho``.

    Args:
        cost: the ground cost ``(N, M)`` or ``(B, N, M)``.
        a: weights of the rows ``(N,)`` or ``(B, N)``.
        b: weights of the columns ``(M,)`` or ``(B, M)``; a column of weight zero has no part in the plan.
        rho: price of creating or destroying mass; ``None`` if it is forbidden.
        work: where the kernel is kept: the plan is valid until the next kernel is made there.
    """

    holds_all_rows = True

    def __init__(self, cost: GroundCost, a: Tensor, b: Tensor, rho: float | None, work: Workspace) -> None:
        self.cost, self.a, self.b, self.rho, self.work = cost, a, b, rho, work
        self._row_weights = a
        self.log_b = b.log()
        self.kept = b > 0 if bool((b == 0).any()) else None
        self.streamed = cost.too_large(a)
        self._make_blocks()

    def _make_blocks(self) -> None:
        *batch, n, m = self.cost.shape
        a = self._row_weights
        self.sums, self.u, self.top = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
        entries = STREAMED.get(a.device.type, CACHED) if self.streamed else CACHED
        size = n if batch or (a.is_cuda and not self.streamed) else min(n, max(16, entries // m))
        storage = self.work.empty("kernel", (*batch, size if self.streamed else n, m), a)
        self.blocks = []
        for start in range(0, n, max(1, size)):
            part = slice(start, min(n, start + size))
            kernel = storage[..., : part.stop - start, :] if self.streamed else storage[..., part, :]
            vectors = (tensor[..., part] for tensor in (a, self.sums, self.u, self.top))
            self.blocks.append(_Block(part, kernel, kernel.mT, *vectors))

    def absorb(self, g: Tensor, eps: float | Tensor) -> None:
        """Make the kernel at the potential ``g`` ``(..., M)``; ``eps`` is a number, or ``(B, 1)`` for a batch."""
        self.eps, self.scaled_g = eps, g / eps
        self.exponents = self.log_b + self.scaled_g
        if self.cost.column is not None:
            self.exponents -= self.cost.column / eps
        self.share = 1.0 if self.rho is None else self.rho / (self.rho + eps)
        self.g = g
        if not self.streamed:
            for block in self.blocks:
                self._fill(block, self.exponents)

    def columns(self, w: Tensor) -> Tensor:
        """Column marginals ``(..., M)`` of the plan at the potential ``g + eps w``."""
        self._scale_columns(w)
        for i, block in enumerate(self._filled()):
            self._answer(block)
            if i == 0:
                total = _times(block.transposed, block.u)
            else:
                total.addmv_(block.transposed, block.u)
        return total.mul_(self.v)

    def log_sums_at(self, w: Tensor) -> Tensor:
        """:meth:`log_sums` at the potential ``g + eps w``, without the pass over the columns."""
        self._scale_columns(w)
        for block in self._filled():
            _product(block, self.v)
        return self.log_sums()

    def weighted(self, vector: Tensor) -> Tensor:
        """A vector ``(..., M)`` with zeros where columns have no weight."""
        return vector if self.kept is None else torch.where(self.kept, vector, 0)

    def log_sums(self) -> Tensor:
        """Logarithms ``(..., N)`` of the row sums at the last potential, the scale of the rows included."""
        return self.top + self.sums.log()

    def row_potential(self) -> Tensor:
        """The answer ``(..., N)`` to the last potential."""
        return -(self.eps * self.share) * self.log_sums()

    def column_potential(self, f: Tensor) -> Tensor:
        """The exact answer ``(..., M)`` to the potential ``f`` ``(..., N)``, also where a column has no weight."""
        exponents, total = self._row_weights.log() + f / self.eps, torch.full_like(self.b, -torch.inf)
        for part in self.cost.parts():
            inverse = 1 / self.eps if isinstance(self.eps, float) else (1 / self.eps).unsqueeze(-1)
            block = exponents[..., part].unsqueeze(-1) - self.cost.rows(part) * inverse
            total = torch.logaddexp(total, block.logsumexp(-2))
        return -(self.eps * self.share) * total

    def symmetrise(self, w: Tensor) -> None:
        """Give the rows the scaling of the columns, ``exp(w)`` in all: for the transport of a measure to itself."""
        self.u.copy_(self._row_weights * (w + self.top).exp())

    def displacements(self, x: Tensor, y: Tensor, *, of_x: bool, of_y: bool) -> tuple[Tensor | None, Tensor | None]:
        """``sum_j P_ij (x_i - y_j)`` ``(..., N, D)`` and ``sum_i P_ij (y_j - x_i)`` ``(..., M, D)``, of the last plan.

        That is the gradient for half squared distances; for distances the plan is first divided by them. The kernel becomes the
        plan, and is of no use any more.
        """
        from_x, from_y = (torch.empty_like(t) if asked else None for t, asked in ((x, of_x), (y, of_y)))
        columns, product = torch.zeros_like(self.v), torch.addmm if x.ndim == 2 else torch.baddbmm
        for i, block in enumerate(self._filled()):
            part, plan = block.rows, block.kernel.mul_(self.v.unsqueeze(-2)).mul_(block.u.unsqueeze(-1))
            if self.cost.distances is not None:
                distances = self.cost.distances(part)
                plan = torch.where(distances > 0, plan / distances, 0)
            some = x[..., part, :]
            if from_x is not None:
                torch.mul(plan.sum(-1, keepdim=True), some, out=from_x[..., part, :])
                product(from_x[..., part, :], plan, y, alpha=-1, out=from_x[..., part, :])
            if from_y is not None:
                columns += plan.sum(-2)
                product(from_y, plan.mT, some, beta=float(i > 0), alpha=-1, out=from_y)
        if from_y is not None:
            from_y.addcmul_(columns.unsqueeze(-1), y)
        return from_x, from_y

    def plan(self) -> Tensor:
        """The last plan, ``(..., N, M)``."""
        return torch.cat([b.u.unsqueeze(-1) * b.kernel * self.v.unsqueeze(-2) for b in self._filled()], -2)

    def _scale_columns(self, w: Tensor) -> None:
        if self.streamed:
            self.v, self.now = torch.ones_like(w), self.exponents + w
        else:
            self.v, self.now = w.exp(), self.exponents
        self.v = self.weighted(self.v)

    def _filled(self) -> Iterator[_Block]:
        for block in self.blocks:
            if self.streamed:
                self._fill(block, self.now)
            yield block

    def _fill(self, block: _Block, exponents: Tensor) -> None:
        kernel, cost, eps = block.kernel, self.cost, self.eps
        matrix = cost.matrix(block.rows, kernel) if cost.lazy else cost.matrix(block.rows)
        if isinstance(eps, float):
            torch.sub(exponents, matrix, alpha=1 / eps, out=kernel)
        else:
            torch.addcdiv(exponents.unsqueeze(-2), matrix, eps.unsqueeze(-1), value=-1, out=kernel)
        torch.amax(kernel, -1, out=block.top)
        kernel.sub_(block.top.unsqueeze(-1)).clamp_(min=FLOOR).exp_()
        if cost.row is not None:
            block.top.sub_(cost.row[..., block.rows] / eps)

    def _answer(self, block: _Block) -> None:
        """The scaling of the rows that makes them exact."""
        _product(block, self.v)
        if self.rho is None:
            torch.div(block.a, block.sums, out=block.u)
        else:
            exponent = (1 - self.share) * block.top - self.share * block.sums.log()
            torch.mul(block.a, exponent.exp_(), out=block.u)


def _product(block: _Block, v: Tensor) -> None:
    if v.ndim == 1:
        torch.mv(block.kernel, v, out=block.sums)
    else:
        torch.bmm(block.kernel, v.unsqueeze(-1), out=block.sums.unsqueeze(-1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(matrix, vector) if matrix.ndim == 2 else torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1)

"""The kernel of a problem whose rows are shared among the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.problem.costs import GroundCost
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel
from lightning_wdefense.transport.sharing import Share


class SharedKernel(GibbsKernel):
    """:class:`GibbsKernel` of a single problem, of which each rank holds the rows of its own points.

    Vectors are whole on every rank, and equal to the last bit, so that all ranks take the same decisions. An iteration sends the row
    sums, ``N / ranks`` numbers of each rank, and adds up the column marginals, ``M`` numbers.

    Args:
        cost: the ground cost ``(N_r, M)`` of this rank's rows.
        back: makes the ground cost ``(M_r, N)`` of this rank's columns; asked for only if the gradient in ``y`` is.
        a: weights of all rows ``(N,)``.
        b: weights of the columns ``(M,)``.
        rho: price of creating or destroying mass; ``None`` if it is forbidden.
        work: where the kernel is kept.
        share: whose rows are where.
    """

    def __init__(
        self,
        cost: GroundCost,
        back: Callable[[], GroundCost],
        a: Tensor,
        b: Tensor,
        rho: float | None,
        work: Workspace,
        share: Share,
    ) -> None:
        self._share, self._back, self._all_a = share, back, a
        super().__init__(cost, a[share.own], b, rho, work)
        self._own_a, self.a = self.a, a

    def columns(self, w: Tensor) -> Tensor:
        """Column marginals ``(M,)`` of the plan at the potential ``g + eps w``."""
        self._last = w
        total = super().columns(w) if self.blocks else torch.zeros_like(w)
        return self._share.ranks.sum(total)

    def log_sums_at(self, w: Tensor) -> Tensor:
        """:meth:`log_sums` at the potential ``g + eps w``, without the pass over the columns."""
        self._last = w
        return super().log_sums_at(w)

    def log_sums(self) -> Tensor:
        """Logarithms ``(N,)`` of the row sums at the last potential."""
        return self._share.ranks.gather(super().log_sums(), self._share.sizes)

    def column_potential(self, f: Tensor) -> Tensor:
        """The exact answer ``(M,)`` to the potential ``f`` ``(N,)``, also where a column has no weight."""
        self.a = self._own_a
        own = super().column_potential(f[self._share.own]) / -(self.eps * self.share)
        self.a = self._all_a
        total = self._share.ranks.gather(own.unsqueeze(0), [1] * self._share.ranks.size).logsumexp(0)
        return -(self.eps * self.share) * total

    def symmetrise(self, w: Tensor) -> None:
        """Give the rows the scaling of the columns, ``exp(w)`` in all: for the transport of a measure to itself."""
        self.u.copy_(self._own_a * (w[self._share.own] + self.top).exp())

    def displacements(self, x: Tensor, y: Tensor, *, of_x: bool, of_y: bool) -> tuple[Tensor | None, Tensor | None]:
        """Those of :class:`GibbsKernel` for this rank's own points; zero for all others."""
        own, log_rows, log_columns = self._share.own, None, self.scaled_g + self._last
        if of_y:
            log_rows = self.row_potential() / self.eps
        from_x = from_y = None
        if of_x:
            part, _ = super().displacements(x[own], y, of_x=True, of_y=False)
            from_x = torch.zeros_like(x)
            from_x[own] = part
        if of_y and log_rows is not None:
            back = GibbsKernel(self._back(), self.b[own], self._all_a, self.rho, self.work)
            back.absorb(log_rows * self.eps, self.eps)
            back.log_sums_at(torch.zeros_like(log_rows))
            back.symmetrise(log_columns[own])
            part, _ = back.displacements(y[own], x, of_x=True, of_y=False)
            from_y = torch.zeros_like(y)
            from_y[own] = part
        return from_x, from_y

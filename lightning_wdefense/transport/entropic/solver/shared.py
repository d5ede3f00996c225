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

    The clouds have equal numbers of points, shared alike.

    Args:
        cost: the ground cost ``(N_r, M)`` of this rank's rows.
        back: makes the ground cost ``(M_r, N)`` of this rank's columns; asked for only if the gradient in ``y`` is.
        a: weights of all rows ``(N,)``.
        b: weights of the columns ``(M,)``.
        rho: price of creating or destroying mass; ``None`` if it is forbidden.
        work: where the kernel is kept.
        share: whose rows are where.
    """

    holds_all_rows = False

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
        self._share, self._back = share, back
        super().__init__(cost, a[share.own], b, rho, work)
        self.a = a

    def columns(self, w: Tensor) -> Tensor:
        """Column marginals ``(M,)`` of the plan at the potential ``g + eps w``."""
        self._last = w
        if self.blocks:
            own = super().columns(w)
        else:  # a rank without points
            self._scale_columns(w)
            own = torch.zeros_like(w)
        return self._share.ranks.sum(own)

    def log_sums_at(self, w: Tensor) -> Tensor:
        """:meth:`log_sums` at the potential ``g + eps w``, without the pass over the columns."""
        self._last = w
        return super().log_sums_at(w)

    def log_sums(self) -> Tensor:
        """Logarithms ``(N,)`` of the row sums at the last potential."""
        return self._share.ranks.gather(super().log_sums(), self._share.sizes)

    def column_potential(self, f: Tensor) -> Tensor:
        """The exact answer ``(M,)`` to the potential ``f`` ``(N,)``, also where a column has no weight."""
        own = super().column_potential(f[self._share.own]) / -(self.eps * self.share)
        total = self._share.ranks.gather(own.unsqueeze(0), [1] * self._share.ranks.size).logsumexp(0)
        return -(self.eps * self.share) * total

    def symmetrise(self, w: Tensor) -> None:
        """Give the rows the scaling of the columns, ``exp(w)`` in all: for the transport of a measure to itself."""
        super().symmetrise(w[self._share.own])

    def displacements(self, x: Tensor, y: Tensor, *, of_x: bool, of_y: bool) -> tuple[Tensor | None, Tensor | None]:
        """Those of :class:`GibbsKernel` for this rank's own points; zero for all others."""
        own = self._share.own
        f, log_columns = self.row_potential(), self.scaled_g + self._last
        from_x, from_y = (torch.zeros_like(t) if asked else None for t, asked in ((x, of_x), (y, of_y)))
        if from_x is not None and self.blocks:
            from_x[own] = super().displacements(x[own], y, of_x=True, of_y=False)[0]  # type: ignore[assignment]
        if from_y is not None and self.blocks:
            # The plan's columns of this rank's points are rows of the transposed problem, at the same potentials.
            back = GibbsKernel(self._back(), self.b[own], self.a, self.rho, self.work)
            back.absorb(f, self.eps)
            back.log_sums_at(torch.zeros_like(f))
            back.symmetrise(log_columns[own])
            from_y[own] = back.displacements(y[own], x, of_x=True, of_y=False)[0]  # type: ignore[assignment]
        return from_x, from_y

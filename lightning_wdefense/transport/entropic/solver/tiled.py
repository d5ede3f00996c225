"""The kernel of two clouds that are too large for a stored cost, on a GPU: computed tile by tile by Triton."""

from __future__ import annotations

from torch import Tensor

from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel


class TiledKernel(GibbsKernel):
    """:class:`GibbsKernel` of half squared distances in ``O((N + M) D)`` memory, with logarithms in the place of scalings."""

    def _make_blocks(self) -> None:
        self.blocks = []
        self._x, self._y = self.cost.points or (self.a, self.b)
        self._log_a = self.a.log()

    def columns(self, w: Tensor) -> Tensor:
        """Column marginals ``(M,)`` of the plan at the potential ``g + eps w``."""
        self._log_u = self._log_a - self.share * self.log_sums_at(w)
        return (self._exponents + self._column_sums()).exp()

    def log_sums_at(self, w: Tensor) -> Tensor:
        """:meth:`log_sums` at the potential ``g + eps w``."""
        from lightning_wdefense.transport.entropic.triton.streaming import log_sums

        self._exponents = self.log_b + self.scaled_g + w
        self._row_sums = log_sums(self._x, self._y, self._exponents, float(self.eps))
        return self._row_sums

    def log_sums(self) -> Tensor:
        """Logarithms ``(N,)`` of the row sums at the last potential."""
        return self._row_sums

    def symmetrise(self, w: Tensor) -> None:
        """Give the rows the scaling of the columns, ``exp(w)`` in all."""
        self._log_u = self._log_a + w

    def displacements(self, x: Tensor, y: Tensor, *, of_x: bool, of_y: bool) -> tuple[Tensor | None, Tensor | None]:
        """``sum_j P_ij (x_i - y_j)`` ``(N, D)`` and ``sum_i P_ij (y_j - x_i)`` ``(M, D)``, of the last plan."""
        from lightning_wdefense.transport.entropic.triton.streaming import weighted_points

        from_x = from_y = None
        if of_x:
            rows = (self._log_u + self._row_sums).exp().unsqueeze(-1)
            from_x = rows * (x - weighted_points(x, y, self._exponents, self._row_sums, float(self.eps)))
        if of_y:
            sums = self._column_sums()
            columns = (self._exponents + sums).exp().unsqueeze(-1)
            from_y = columns * (y - weighted_points(y, x, self._log_u, sums, float(self.eps)))
        return from_x, from_y

    def _column_sums(self) -> Tensor:
        from lightning_wdefense.transport.entropic.triton.streaming import log_sums

        return log_sums(self._y, self._x, self._log_u, float(self.eps))

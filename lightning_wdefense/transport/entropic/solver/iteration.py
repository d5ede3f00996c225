"""The Sinkhorn iteration at one temperature: Gauss-Seidel in the kernel domain with safeguarded Anderson acceleration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.constants import ABSORBED, ENTRY, FARTHEST, LONGEST, NOTHING, TINY
from lightning_wdefense.transport.entropic.solver.anderson import Anderson
from lightning_wdefense.transport.entropic.solver.arrays import Array, array, longest, namespace, norm, tensor
from lightning_wdefense.transport.entropic.solver.dual import semi_dual
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel

ROUNDING = 64
"""Units in the last place by which the dual value may fall and still count as not fallen (rounding)."""


class _Point(NamedTuple):
    """Where the iteration was: exponents of the scaling, the plain step from there, and the dual value."""

    w: Array
    residual: Array
    value: float | Array


class Iteration:
    """The Sinkhorn iteration on the potential ``g + eps w`` of the columns, ``w`` small enough for the kernel at ``g``."""

    def __init__(self, kernel: GibbsKernel, b: Tensor) -> None:
        self.kernel, self.rho, self.xp = kernel, kernel.rho, namespace(b)
        self.history = Anderson(b.sqrt(), self.xp)
        self._slack = ROUNDING * torch.finfo(b.dtype).eps
        constants = b, b.sqrt(), torch.where(b > 0, b.rsqrt(), 0), b.sum(-1).sqrt(), b.clamp(min=TINY).log()
        self._b, self._root_b, self._inverse_root_b, self._root_mass, self._log_b = (
            array(self.xp, c) for c in constants
        )
        self._a = array(self.xp, kernel.a)
        # What has no weight stays where it is: a long step of it would shorten those of the others.
        self._inverse_rho = None if self.rho is None else array(self.xp, (b > 0).to(b) / self.rho)
        self._tiny, self._root_tiny = (array(self.xp, b.new_tensor(tiny)) for tiny in (TINY, TINY**0.5))

    def log_step(self, g: Tensor, eps: float | Tensor) -> Tensor:
        """A plain step from ``g`` in the log domain, from where no entry of the kernel may be left."""
        self.kernel.absorb(g, eps)
        self.kernel.columns(torch.zeros_like(g))
        return self.kernel.column_potential(self.kernel.row_potential())

    def error_at(self, g: Tensor, eps: float | Tensor) -> float:
        """Largest error of the batch at a potential."""
        self.kernel.absorb(g, eps)
        columns = self.kernel.columns(torch.zeros_like(g))
        return float(self._error(array(self.xp, columns), array(self.xp, g)).max())

    def run(
        self, g: Tensor, eps: float | Tensor, tol: float | Tensor, max_iter: int, patience: int
    ) -> tuple[Tensor, Tensor, int]:
        """Potential, error and number of iterations at which the error is below ``tol``.

        Gives up after ``patience`` iterations if the error is not even below ``ENTRY``.

        Extrapolation alone may diverge. A plain step never lowers the dual value. So a step that lowered it is undone and replaced by one
        that is nearer to the plain step, and the history starts again.
        """
        xp, kernel, history, single = self.xp, self.kernel, self.history, g.ndim == 1
        eps_, tol_ = (array(xp, each) if isinstance(each, Tensor) else each for each in (eps, tol))
        kernel.absorb(g, eps)
        history.reset()
        g, w, before = array(xp, g), array(xp, torch.zeros_like(g)), None
        for n_iter in range(1, max_iter + 1):
            columns = array(xp, kernel.columns(tensor(w)))
            potential = g if self.rho is None else g + eps_ * w
            error = _scalars(self._error(columns, potential))
            done = error <= tol_
            if n_iter == max_iter or _all(done) or (n_iter == patience and not _all(error <= ENTRY)):
                break
            here = _Point(w, self._residual(columns, potential), self._value(w, potential))
            following = history.next(w, here.residual)
            if before is not None:
                # Written so that NaN counts as fallen too.
                kept = (here.value >= before.value - self._slack * abs(here.value)) | done
                if not _all(kept):
                    following = self._choose(kept, following, self._shortened(w, before.w + before.residual, 0.25))
                    here = _Point(*(self._choose(kept, *pair) for pair in zip(here, before, strict=True)))
                    history.forget(not kept if isinstance(kept, bool) else ~kept, here.w, here.residual)
            before = here
            w = following if single else self._choose(done, w, following)
            length = longest(xp, w)
            if not length <= ABSORBED:
                if not length <= FARTHEST:
                    w = self._shortened(w, here.w + here.residual, 1.0)
                before = before._replace(w=before.w - w)
                g = g + eps_ * w
                kernel.absorb(tensor(g), eps)
                history.shift(w)
                w = xp.zeros_like(w)
        return tensor(g + eps_ * w), torch.as_tensor(error, dtype=kernel.b.dtype, device=kernel.b.device), n_iter

    def _error(self, columns: Array, potential: Array) -> Array:
        """Root mean square ``(...)`` of the relative error of the marginal; the L1 error is not larger."""
        if self.rho is None:
            return norm(self.xp, (columns - self._b) * self._inverse_root_b) / self._root_mass
        root_density = self.xp.maximum(self.xp.exp(potential * (-0.5 / self.rho)), self._root_tiny)
        difference = columns - self._b * root_density * root_density
        root_mass = self.xp.maximum(norm(self.xp, self._root_b * root_density), NOTHING * self._root_mass)
        return norm(self.xp, difference * self._inverse_root_b / root_density) / root_mass

    def _residual(self, columns: Array, potential: Array) -> Array:
        """Plain Sinkhorn step, in units of the temperature."""
        residual = self._log_b - self.xp.log(self.xp.maximum(columns, self._tiny))
        if self._inverse_rho is None:
            return residual
        share = self.kernel.share
        return (share if isinstance(share, float) else array(self.xp, share)) * (
            residual - potential * self._inverse_rho
        )

    def _value(self, w: Array, potential: Array) -> float | Array:
        """Dual value at the last potential, in units of ``eps``."""
        kernel, xp = self.kernel, self.xp
        if self.rho is not None:
            eps = kernel.eps if isinstance(kernel.eps, float) else kernel.eps[:, 0]
            value = semi_dual(kernel.row_potential(), tensor(potential), kernel.a, kernel.b, eps, self.rho) / eps
            return float(value) if value.ndim == 0 else array(xp, value)
        columns, rows = array(xp, kernel.scaled_g) + w, array(xp, kernel.log_sums())
        if w.ndim == 1:
            return float(self._b @ columns) - float(self._a @ rows)
        return (self._b * columns).sum(-1) - (self._a * rows).sum(-1)

    def _shortened(self, far: Array, near: Array, share: float) -> Array:
        """A point on the way from ``near`` to ``far``: where marginals saturate, extrapolated steps have any length."""
        step = far - near
        factor = LONGEST / self.xp.amax(abs(step), -1, keepdims=True)
        factor = self.xp.where(factor < share, factor, share)
        return self.xp.where(self.xp.isfinite(factor * step), near + factor * step, near)

    def _choose(self, condition: bool | Array, one: Any, other: Any) -> Any:
        if isinstance(condition, bool):
            return one if condition else other
        return self.xp.where(condition.reshape(condition.shape + (1,) * (one.ndim - condition.ndim)), one, other)


def _scalars(values: Array) -> float | Array:
    """A number for a single problem."""
    return float(values) if values.ndim == 0 else values


def _all(conditions: bool | Array) -> bool:
    return bool(conditions if isinstance(conditions, bool) else conditions.all())

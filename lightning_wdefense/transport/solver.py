"""Dual potentials of entropic transport: annealed Gauss-Seidel in the kernel domain, with Anderson acceleration.

All functions take one problem, costs ``(N, M)`` and a temperature that is a number, or a batch of them, costs ``(B, N, M)`` and
temperatures ``(B, 1)``. A problem of a batch that has converged waits for the others, so that it ends as it would alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.anderson import Anderson
from lightning_wdefense.transport.costs import GroundCost
from lightning_wdefense.transport.dual import density
from lightning_wdefense.transport.kernel import GibbsKernel
from lightning_wdefense.transport.workspace import Workspace

COOLING = 8.0
"""Ratio between a temperature of the annealing and the next one."""

WARMEST = 0.06
"""Share of the mean cost up to which, times ``COOLING``, a temperature is easy enough to start at."""

ENTRY = 0.01
"""Marginal error at which a temperature above the final one is left; a worse start costs more than it saves."""

PATIENCE = 50
"""Iterations after which a first temperature at which the error is above ``ENTRY`` was too low to start at."""

REHEATINGS = 5
"""Higher temperatures that are tried then."""

WARM = 1.0
"""Marginal error of given potentials above which the annealing, from nothing, is the better start."""

ABSORBED = 15.0
"""Largest exponent of the scaling; beyond it the kernel is made anew, before its entries underflow."""

FARTHEST = 50.0
"""Exponents beyond which a step was too long to be believed."""

LONGEST = 10.0
"""Longest step that is taken in the place of one that was too long."""

TINY = 1e-30
"""Smallest marginal that is told from none."""

ROUNDING = 64
"""Units in the last place by which a value may fall and still count as not fallen."""

AVERAGING = 2 / 3
"""Step of the symmetric iteration: the error falls to a third or less, as the plan's eigenvalues are between 0 and 1."""

SELF_ACCURACY = 0.1
"""Tolerance of the transport to itself as a share of the other one's: it costs a pass or two."""


class Solution(NamedTuple):
    """Potentials of a problem or of a batch: ``f`` the exact answer to ``g``, and the plan of both."""

    f: Tensor
    g: Tensor
    n_iter: int
    error: Tensor
    kernel: GibbsKernel


def solve(
    cost: GroundCost,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    rho: float | None,
    work: Workspace,
    *,
    mean: float | Tensor,
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
) -> Solution:
    """Potentials of the transport of ``a`` to ``b``, to a relative marginal error of ``tol``.

    At a high temperature the problem is easy, and its solution is a good start for the next one. A problem that needs fewer
    temperatures than others of its batch stays at its first one, so that it takes the same path as it would alone.

    Args:
        cost: the ground cost.
        a: weights of the rows.
        b: weights of the columns.
        eps: final temperature, a number or ``(B, 1)``.
        rho: price of creating or destroying mass, or ``None``.
        work: where the kernel is kept.
        mean: the mean cost, a number or ``(B, 1)``: the annealing starts below it.
        tol: error at which to stop.
        max_iter: most iterations, those of the annealing included.
        start: potential on ``y`` to start from.
    """
    iteration = _Iteration(GibbsKernel(cost, a, b, rho, work), b)
    levels = _levels(mean, eps)
    if start is not None and iteration.error_at(start, eps) < WARM:
        levels = 0 if isinstance(levels, int) else torch.zeros_like(levels)
    g, n_iter = torch.zeros_like(b) if start is None else start, 0
    level = warmest = levels if isinstance(levels, int) else int(levels.max())
    reheatings = 0
    while True:
        if isinstance(levels, int):
            temperature, level_tol = eps * COOLING**level, max(tol, ENTRY) if level else tol
        else:
            height = levels.clamp(max=level)
            temperature, level_tol = eps * COOLING**height, torch.where(height[:, 0] > 0, max(tol, ENTRY), tol)
        patience = PATIENCE if level == warmest and reheatings < REHEATINGS else max_iter
        g, error, n = iteration.run(g, temperature, level_tol, max(1, max_iter - n_iter), patience)
        n_iter += n
        stuck = error > ENTRY
        if n == patience and n_iter < max_iter and bool(stuck.any()):
            # Groups of points that exchange no mass at this temperature settle their balance at a higher one.
            levels = levels + 1 if isinstance(levels, int) else levels + stuck[:, None]
            level = warmest = levels if isinstance(levels, int) else int(levels.max())
            reheatings += 1
        elif level == 0:
            break
        else:
            level -= 1
    kernel = iteration.kernel
    f = kernel.row_potential()
    if kernel.kept is not None:
        g = torch.where(b > 0, g, kernel.column_potential(f))
    return Solution(f, g, n_iter, error, kernel)


def solve_symmetric(
    cost: GroundCost,
    a: Tensor,
    eps: float | Tensor,
    rho: float | None,
    work: Workspace,
    *,
    tol: float,
    max_iter: int,
) -> Solution:
    """Potentials of the transport of ``a`` to itself: one vector, found by averaging (no annealing is needed).

    For a cost that is zero on the diagonal the scaling lies between ``n^-1/2`` and ``a^-1/2``, whatever the temperature.
    """
    kernel = GibbsKernel(cost, a, a, rho, work)
    g = torch.zeros_like(a)
    kernel.absorb(g, eps)
    w = 0.5 * kernel.weighted(kernel.answer(g) / eps)
    for n_iter in range(1, max_iter + 1):
        gap = kernel.weighted(kernel.answer(w) / eps - (g / eps + w))
        error = (a * (-gap / kernel.share).clamp(max=80).expm1().square()).sum(-1).div(a.sum(-1)).sqrt()
        done = error <= SELF_ACCURACY * tol
        if n_iter == max_iter or bool(done.all()):
            break
        w = w + AVERAGING * gap if w.ndim == 1 else torch.where(done[:, None], w, w + AVERAGING * gap)
        if float(torch.linalg.vector_norm(w, math.inf)) > ABSORBED:
            g, w = g + eps * w, torch.zeros_like(w)
            kernel.absorb(g, eps)
    kernel.symmetrise(g / eps + w)
    f = kernel.row_potential()
    return Solution(f, torch.where(a > 0, g + eps * w, f), n_iter, error, kernel)


def _levels(mean: float | Tensor, eps: float | Tensor) -> int | Tensor:
    """How many temperatures come before the final one."""
    if isinstance(mean, Tensor):
        return (WARMEST * mean / eps).clamp(min=1).log().div(math.log(COOLING)).floor()
    return math.floor(math.log(max(1.0, WARMEST * mean / eps)) / math.log(COOLING))


class _Point(NamedTuple):
    """Where the iteration was: exponents of the scaling, the plain step from there, and the dual value."""

    w: Tensor
    residual: Tensor
    value: float | Tensor


class _Iteration:
    """The Sinkhorn iteration on the potential ``g + eps w`` of the columns, ``w`` small enough for the kernel at ``g``."""

    def __init__(self, kernel: GibbsKernel, b: Tensor) -> None:
        self.kernel, self.b, self.rho = kernel, b, kernel.rho
        self.log_b = b.clamp(min=TINY).log()
        self.history = Anderson(b.sqrt())
        self._slack = ROUNDING * torch.finfo(b.dtype).eps
        self._scale = torch.where(b > 0, b.rsqrt(), 0) / b.sum(-1, keepdim=True).sqrt()

    def error_at(self, g: Tensor, eps: float | Tensor) -> float:
        """Largest error of the batch at a potential."""
        self.kernel.absorb(g, eps)
        w = torch.zeros_like(g)
        return float(self._error(self.kernel.columns(w), g).max())

    def run(
        self, g: Tensor, eps: float | Tensor, tol: float | Tensor, max_iter: int, patience: int
    ) -> tuple[Tensor, Tensor, int]:
        """Potential, error and number of iterations at which the error is below ``tol``.

        Gives up after ``patience`` iterations if the error is not even below ``ENTRY``.

        Extrapolation by itself may wander off. Plain steps never lower the dual value, so a step that did is taken back, one
        that is nearer to the plain step is taken in its place, and the history starts anew.
        """
        kernel, history, single = self.kernel, self.history, g.ndim == 1
        kernel.absorb(g, eps)
        history.reset()
        w, before = torch.zeros_like(g), None
        for n_iter in range(1, max_iter + 1):
            columns = kernel.columns(w)
            potential = g if self.rho is None else g + eps * w
            error = _scalars(self._error(columns, potential))
            done = error <= tol
            if n_iter == max_iter or _all(done) or (n_iter == patience and not _all(error <= ENTRY)):
                break
            value = _scalars(kernel.value(w))
            here = _Point(w, self._residual(columns, potential), value)
            following = history.next(w, here.residual)
            if before is not None:
                # Written so that NaN counts as fallen too.
                kept = (value >= before.value - self._slack * abs(value)) | done
                if not _all(kept):
                    history.keep(kept)
                    following = _choose(kept, following, _shortened(w, before.w + before.residual, 0.25))
                    here = _Point(*(_choose(kept, *pair) for pair in zip(here, before, strict=True)))
            before = here
            w = following if single else _choose(done, w, following)
            length = float(torch.linalg.vector_norm(w, math.inf))
            if not length <= ABSORBED:
                if not length <= FARTHEST:
                    w = _shortened(w, here.w + here.residual, 1.0)
                before = before._replace(w=before.w - w)
                g = g + eps * w
                kernel.absorb(g, eps)
                history.shift(w)
                w = torch.zeros_like(g)
        return g + eps * w, torch.as_tensor(error, dtype=g.dtype, device=g.device), n_iter

    def _error(self, columns: Tensor, potential: Tensor) -> Tensor:
        """Root mean square ``(...)`` of the relative error of the marginal; the L1 error is not larger."""
        if self.rho is None:
            return torch.linalg.vector_norm((columns - self.b).mul_(self._scale), dim=-1)
        target = self.b * density(potential, self.rho)
        scale = torch.where(target > 0, target.rsqrt(), 0)
        return torch.linalg.vector_norm((columns - target) * scale, dim=-1) / target.sum(-1).sqrt()

    def _residual(self, columns: Tensor, potential: Tensor) -> Tensor:
        """Plain Sinkhorn step, in units of the temperature."""
        residual = self.log_b - columns.clamp_(min=TINY).log_()
        return residual if self.rho is None else self.kernel.share * (residual - potential / self.rho)


def _shortened(far: Tensor, near: Tensor, share: float) -> Tensor:
    """A point on the way from ``near`` to ``far``: where marginals saturate, extrapolated steps have any length."""
    step = far - near
    length = torch.linalg.vector_norm(step, math.inf, dim=-1, keepdim=True)
    return torch.where(length.isfinite(), near + step * (LONGEST / length).clamp(max=share), near)


def _scalars(values: Tensor) -> float | Tensor:
    """A number for a single problem: arithmetic with it takes a tenth of the time."""
    return values.item() if values.ndim == 0 else values


def _all(conditions: bool | Tensor) -> bool:
    return conditions if isinstance(conditions, bool) else bool(conditions.all())


def _choose(condition: bool | Tensor, one: Any, other: Any) -> Any:
    if isinstance(condition, bool):
        return one if condition else other
    return torch.where(condition.reshape(condition.shape + (1,) * (one.ndim - condition.ndim)), one, other)

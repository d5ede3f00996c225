"""Dual potentials of entropic transport: annealed Gauss-Seidel in the kernel domain, with Anderson acceleration.

All functions take one problem, costs ``(N, M)`` and a temperature that is a number, or a batch of them, costs ``(B, N, M)`` and
temperatures ``(B, 1)``. A problem of a batch that has converged waits for the others, so that it ends as it would alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport import triton
from lightning_wdefense.transport.anderson import Anderson
from lightning_wdefense.transport.arrays import Array, array, longest, namespace, norm, tensor
from lightning_wdefense.transport.costs import GroundCost
from lightning_wdefense.transport.dual import semi_dual
from lightning_wdefense.transport.kernel import GibbsKernel
from lightning_wdefense.transport.tiled import gibbs_kernel
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

    On a GPU, Triton finds them in one launch where it can, and what follows is their check.

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
    iteration = _Iteration(gibbs_kernel(cost, a, b, rho, work), b)
    levels = _levels(mean, eps)
    if triton.available(a.device) and not cost.too_large(a.device):
        found = triton.potential(cost.rows().contiguous(), a, b, eps, rho, mean, tol, max_iter, start)
        start = start if found is None else found
    g, n_iter = torch.zeros_like(b), 0
    if start is not None:
        if rho is None:  # Only differences count, and they would drown beside a large constant.
            start = start - (b * start).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
        if iteration.error_at(start, eps) < WARM:
            g, levels = start, 0 if isinstance(levels, int) else torch.zeros_like(levels)
    level = warmest = levels if isinstance(levels, int) else int(levels.max())
    temperature: float | Tensor
    level_tol: float | Tensor
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
    kernel, xp = gibbs_kernel(cost, a, a, rho, work), namespace(a)
    root_a, root_mass = array(xp, a.sqrt()), array(xp, a.sum(-1).sqrt())
    g = torch.zeros_like(a)
    kernel.absorb(g, eps)
    share = kernel.share if isinstance(kernel.share, float) else array(xp, kernel.share)

    def gap_at(w: Array) -> Array:
        """The step from ``w`` to its exact answer, in units of the temperature."""
        log_sums = kernel.log_sums_at(tensor(w))
        return array(xp, kernel.weighted(log_sums)) * -share - (array(xp, kernel.scaled_g) + w)

    w = 0.5 * gap_at(array(xp, g))
    for n_iter in range(1, max_iter + 1):
        gap = gap_at(w)
        error = norm(xp, root_a * xp.expm1(gap * (-1 / share))) / root_mass
        done = error <= SELF_ACCURACY * tol
        if n_iter == max_iter or bool(done.all()):
            break
        w = w + AVERAGING * gap if w.ndim == 1 else xp.where(done[:, None], w, w + AVERAGING * gap)
        if longest(xp, w) > ABSORBED:
            g, w = g + eps * tensor(w), xp.zeros_like(w)
            kernel.absorb(g, eps)
    scaled = kernel.scaled_g + tensor(w)
    kernel.symmetrise(scaled)
    f = kernel.row_potential()
    error = torch.as_tensor(error, dtype=a.dtype, device=a.device)
    return Solution(f, torch.where(a > 0, eps * scaled, f), n_iter, error, kernel)


def _levels(mean: float | Tensor, eps: float | Tensor) -> int | Tensor:
    """How many temperatures come before the final one."""
    if isinstance(mean, Tensor):
        return (WARMEST * mean / eps).clamp(min=1).log().div(math.log(COOLING)).floor()
    return math.floor(math.log(max(1.0, WARMEST * mean / eps)) / math.log(COOLING))


class _Point(NamedTuple):
    """Where the iteration was: exponents of the scaling, the plain step from there, and the dual value."""

    w: Array
    residual: Array
    value: float | Array


class _Iteration:
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
        self._tiny, self._root_tiny = (array(self.xp, b.new_tensor(tiny)) for tiny in (TINY, TINY**0.5))

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

        Extrapolation by itself may wander off. Plain steps never lower the dual value, so a step that did is taken back, one
        that is nearer to the plain step is taken in its place, and the history starts anew.
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
        return norm(self.xp, difference * self._inverse_root_b / root_density) / norm(
            self.xp, self._root_b * root_density
        )

    def _residual(self, columns: Array, potential: Array) -> Array:
        """Plain Sinkhorn step, in units of the temperature."""
        residual = self._log_b - self.xp.log(self.xp.maximum(columns, self._tiny))
        if self.rho is None:
            return residual
        share = self.kernel.share
        return (share if isinstance(share, float) else array(self.xp, share)) * (residual - potential / self.rho)

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

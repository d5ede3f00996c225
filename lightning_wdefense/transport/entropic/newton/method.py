"""Dual potentials of a small problem by Newton's method.

Where the rows are exact the dual value is a concave function of one potential. Its second derivative is a matrix ``(M, M)``. For a
hundred points Newton's step costs no more than a dozen of Sinkhorn's sweeps, and saves more than that. Both are needed: Newton's step
balances distant parts of the problem, where sweeps converge slowly. The sweeps balance each point's own mass, where Newton's method
converges slowly.
"""

from __future__ import annotations

import math

import numpy
import torch

from lightning_wdefense.transport.entropic.constants import WARM
from lightning_wdefense.transport.entropic.newton.kernel import DenseKernel, Look, Matrix, Potentials, Vector

COOLING = 4.0
"""Largest ratio between a temperature of the annealing and the next one."""

WARMEST = 0.05
"""Temperature at which the annealing starts, as a share of the mean cost."""

ENTRY = 0.05
"""Relative marginal error at which a temperature above the final one is left."""

FIRST_SWEEPS = 20
"""Sinkhorn steps at a new temperature."""

SWEEPS = 5
"""Sinkhorn steps after one of Newton's."""

STEPS = 40
"""Number of Newton steps after which the method gives up."""

FALLS = 4
"""Number of steps that lowered the dual value and were undone, after which the method gives up."""

DAMPING = 1e-6
"""Share of the weights that is added to the curvature, which is singular where points exchange no mass."""

LONGEST = 10.0
"""Longest step, in units of the temperature."""

ABSORBED = 30.0
"""Largest exponent of the scaling; beyond it the kernel is made anew."""

QUIET = 96
"""Number of unknowns up to which SciPy solves a system without threads. Beyond it SciPy uses all cores, which may be busy."""

SLACK = 1e-12
"""Share by which a dual value may fall and still count as not fallen (rounding)."""


def newton(
    cost: Matrix,
    a: Vector,
    b: Vector,
    eps: float,
    rho: float | None,
    *,
    mean: float,
    tol: float,
    max_iter: int,
    start: Vector | None = None,
) -> Potentials | None:
    """Potentials of the transport of ``a`` to ``b`` to a relative marginal error of ``tol``, or ``None`` if they are not found.

    The arguments are those of :func:`lightning_wdefense.transport.entropic.solver.potentials.solve`, as NumPy arrays in float64, and weights ``b`` are positive.
    An iteration is a sweep or a step of Newton's.
    """
    kernel = DenseKernel(cost, a, b, rho)
    ratio = max(1.0, WARMEST * mean / eps)
    level = round(math.log(ratio, COOLING))
    cooling = ratio ** (1 / level) if level else 1.0
    first, n_iter, steps, falls, sweeps = numpy.zeros_like(b), 0, 0, 0, FIRST_SWEEPS
    if start is not None:
        kernel.absorb(start if rho is not None else start - (b @ start) / b.sum(), eps)
        look = kernel.look()
        if look.error <= tol:
            return kernel.solved(look, 1)
        if look.error < WARM:
            first, level, sweeps = kernel.g, 0, SWEEPS
    kernel.absorb(first, eps * cooling**level)
    before: Look | None = None
    best, damping, longest = first, DAMPING, LONGEST
    while True:
        sweeps = min(sweeps, max_iter - n_iter)
        kernel.sweep(sweeps)
        n_iter += sweeps
        look = kernel.look()
        if abs(look.w).max() > ABSORBED:
            kernel.absorb(kernel.g + kernel.eps * look.w, kernel.eps)
            look = kernel.look()
        if level == 0 and look.error <= tol:
            return kernel.solved(look, n_iter)
        if n_iter >= max_iter or steps >= STEPS or falls >= FALLS:
            return None
        # Written so that NaN counts as fallen.
        if before is not None and not look.value >= before.value - SLACK * max(1.0, abs(before.value)):
            falls, damping, longest = falls + 1, 100 * damping, longest / 4
            kernel.absorb(best, kernel.eps)
            look = kernel.look()
        else:
            damping, longest = max(DAMPING, damping / 100), min(LONGEST, 4 * longest)
        best = kernel.g + kernel.eps * look.w
        if level > 0 and look.error <= ENTRY:
            level -= 1
            kernel.absorb(best, eps * cooling**level, kernel.answer())
            before, sweeps = None, FIRST_SWEEPS
            continue
        step, failed = _solution(kernel.curvature(damping), look.missing)
        length = float(abs(step).max())
        if failed or not math.isfinite(length):
            return None
        if length > longest:
            step *= longest / length
        numpy.exp(look.w + step, out=kernel.v)
        before, sweeps = look, SWEEPS
        steps, n_iter = steps + 1, n_iter + 1


def _solution(matrix: Matrix, right: Vector) -> tuple[Vector, bool]:
    """Solution of a system with a positive definite matrix, of which the lower half is read, and whether it failed."""
    if len(right) <= QUIET:
        from scipy.linalg.lapack import dposv  # a third of a second, for those alone who need it

        _, solution, failed = dposv(matrix, right, lower=1, overwrite_a=1)
        return solution, bool(failed)
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    return torch.cholesky_solve(torch.from_numpy(right[:, None]), factor)[:, 0].numpy(), bool(info)

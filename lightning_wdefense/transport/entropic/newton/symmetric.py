"""Dual potentials of the transport of a small measure to itself, in NumPy."""

from __future__ import annotations

import math

import numpy

from lightning_wdefense.transport.entropic.constants import AVERAGING, SELF_ACCURACY
from lightning_wdefense.transport.entropic.newton.kernel import FLOOR, Matrix, Potentials, Vector, parts

STEP, MOMENTUM = 4 / (1 + math.sqrt(2)) ** 2, ((math.sqrt(2) - 1) / (math.sqrt(2) + 1)) ** 2
"""Of the fastest iteration of second order where eigenvalues, one and those of the plan, are between 1 and 2."""


def averaged(cost: Matrix, a: Vector, eps: float, rho: float | None, *, tol: float, max_iter: int) -> Potentials | None:
    """Potentials of the transport of ``a`` to itself, or ``None`` if they are not found. The cost is zero on the diagonal.

    The scaling then lies between ``n^-1/2`` and ``a^-1/2``, so that the kernel needs no scale.
    """
    kernel = numpy.multiply(cost, -1 / eps)
    numpy.exp(numpy.maximum(kernel, FLOOR, out=kernel), out=kernel)
    kernel *= a
    across = [kernel[part] for part in parts(*cost.shape)]
    share = 1.0 if rho is None else rho / (rho + eps)
    wanted, mass = SELF_ACCURACY * tol, float(a.sum())
    w = before = numpy.log(kernel.sum(1)) * (-0.5 * share)
    for n_iter in range(1, max_iter + 1):
        v = numpy.exp(w)
        log_sums = numpy.log(numpy.concatenate([part @ v for part in across]))
        gap = log_sums * -share - w
        excess = numpy.expm1(gap * (-1 / share))
        error = math.sqrt(float(a @ (excess * excess)) / mass)
        if error <= wanted:
            plan = kernel * v
            plan *= (a * v)[:, None]
            return Potentials(log_sums * (-eps * share), eps * w, plan, n_iter, error)
        if n_iter == 1:
            before, w = w, w + AVERAGING * gap
        else:
            before, w = w, w + STEP * gap + MOMENTUM * (w - before)
    return None

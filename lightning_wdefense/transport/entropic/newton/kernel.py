"""The kernel ``exp((g - C) / eps)`` of a small problem, in NumPy and in float64.

An operation of NumPy has a fraction of the overhead of one of PyTorch, and for 100 x 100 numbers the overhead dominates. In float64 no
entry that matters underflows, and denormal numbers, which are 50 times slower, do not occur.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray

from lightning_wdefense.transport.entropic.constants import NOTHING, TINY
from lightning_wdefense.transport.entropic.problem.costs import ROUNDING

Vector = NDArray[numpy.float64]
Matrix = NDArray[numpy.float64]

FLOOR = -200.0
"""Smallest exponent: far below any mass that counts, and far above the denormal numbers."""

WIDE = 48
"""Number of dimensions from which products of points in the dtype of the caller are faster."""

DUST = 2.0**-50
"""Share of the mass that is added in float64 and subtracted again, so that entries of 2^-52 of it or less become zero."""

UNIT = {"f": 2.0**-23, "d": 2.0**-52}
"""Unit in the last place, by the character of the dtype."""


QUIET = 2**13, 2**18
"""Number of multiplications up to which NumPy's products with a vector and with a matrix use no threads. Beyond it NumPy uses all cores,
independently of PyTorch's settings, and waking them takes longer than these products."""


class Cloud(NamedTuple):
    """A measure in NumPy and in float64: points ``(N, D)``, half their squared lengths ``(N,)``, weights ``(N,)`` and their sum.

    ``given`` are the points in the dtype of the caller, and a one after each: products with them take half of the time or less.
    """

    points: Matrix
    half_squares: Vector
    weights: Vector
    mass: float
    given: NDArray[Any]


def parts(size: int, width: int) -> list[slice]:
    """Parts of ``size`` vectors of ``width`` of which each can be multiplied in quiet."""
    step = max(1, QUIET[0] // width)
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """The product of two matrices, without threads but those of PyTorch."""
    if left.size * right.shape[1] <= QUIET[1]:
        return left @ right
    return torch.mm(torch.from_numpy(left), torch.from_numpy(right)).numpy()


def cloud(points: Matrix, weights: Vector, mass: float, dtype: Any) -> Cloud:
    """The measure of points near the origin."""
    given = numpy.ones((points.shape[0], points.shape[1] + 1), dtype)
    given[:, :-1] = points
    return Cloud(points, 0.5 * numpy.einsum("ij,ij->i", points, points), weights, mass, given)


def half_squared_distances(x: Cloud, y: Cloud, eps: float) -> Matrix:
    """``|x - y|^2 / 2`` between the points ``(N, M)`` of two clouds, zero from each to itself where they are one.

    The product is taken in the dtype of the caller where that saves time and its rounding is nothing beside ``eps``.
    """
    units = ROUNDING * eps / UNIT[x.given.dtype.char]
    if x.points.shape[1] >= WIDE and max(x.half_squares.max(), y.half_squares.max()) <= units:
        cost = product(x.given[:, :-1], y.given[:, :-1].T).astype(numpy.float64)
    else:
        cost = product(x.points, y.points.T)
    numpy.subtract(x.half_squares[:, None], cost, out=cost)
    cost += y.half_squares
    if y is x:
        cost.reshape(-1)[:: len(cost) + 1] = 0
    return cost


def displacements(plan: Matrix, x: Cloud, y: Cloud) -> NDArray[Any]:
    """``sum_j P_ij (x_i - y_j)`` ``(N, D)``."""
    if x.given.dtype != plan.dtype:  # The smallest entries would become denormal numbers.
        plan = plan + DUST * x.mass
        plan -= DUST * x.mass
    sums = product(plan.astype(x.given.dtype, copy=False), y.given)
    result: NDArray[Any] = sums[:, -1:] * x.given[:, :-1]
    result -= sums[:, :-1]
    return result


def density(potential: Vector, rho: float | None) -> Vector | float:
    """:func:`.dual.density`."""
    return 1.0 if rho is None else numpy.exp(potential * (-1 / rho))


def price(potential: Vector, rho: float | None) -> Vector:
    """:func:`.dual.price`."""
    return potential if rho is None else -rho * numpy.expm1(potential * (-1 / rho))


def answer(cost: Matrix, weights: Vector, potential: Vector, eps: float, rho: float | None) -> Vector:
    """The potential ``(N,)`` of the rows that is the exact answer to one of the columns, for any weights of the rows."""
    exponents = (potential - cost) * (1 / eps) + numpy.log(weights)
    top = exponents.max(1)
    log_sums = numpy.log(numpy.exp(exponents - top[:, None]).sum(1)) + top
    return -(eps if rho is None else eps * rho / (rho + eps)) * log_sums


class Potentials(NamedTuple):
    """A solved problem: ``f`` the exact answer to ``g``, the plan of both, and the error of its columns."""

    f: Vector
    g: Vector
    plan: Matrix
    n_iter: int
    error: float


class Look(NamedTuple):
    """The plan at a scaling: exponents of the scaling, missing mass of the columns, error, dual value in units of ``eps``."""

    w: Vector
    missing: Vector
    error: float
    value: float


class DenseKernel:
    """The plan ``diag(u) K diag(v)``, its rows always exact: ``K = b exp((g - C) / eps)`` with each row scaled, ``v = exp(w)``.

    Args:
        cost: ``(N, M)``.
        a: weights of the rows.
        b: weights of the columns, all positive.
        rho: price of creating or destroying mass, or ``None``.
    """

    def __init__(self, cost: Matrix, a: Vector, b: Vector, rho: float | None) -> None:
        self.cost, self.a, self.b, self.rho = cost, a, b, rho
        self.log_b, self.root_mass = numpy.log(b), math.sqrt(b.sum())
        self.kernel, self._plan, self.v = numpy.empty_like(cost), numpy.empty_like(cost), numpy.ones_like(b)
        self._matrix = numpy.empty((len(b), len(b)), order="F")
        self._sums, self._u, self._columns = numpy.empty_like(a), numpy.empty_like(a), numpy.empty_like(b)
        n, m = cost.shape
        self._across = [(self.kernel[part], self._sums[part]) for part in parts(n, m)]
        self._along = [(self.kernel[:, part], self._columns[part]) for part in parts(m, n)]

    def absorb(self, g: Vector, eps: float, answer: Vector | None = None) -> None:
        """Make the kernel at the potential ``g``, with the scale that makes its rows about one: the answer to it, or the largest."""
        self.g, self.eps, self.scaled_g = g, eps, g / eps
        kernel = numpy.multiply(self.cost, -1 / eps, out=self.kernel)
        kernel += self.scaled_g + self.log_b
        self.scale = kernel.max(1) if answer is None else answer * (-1 / eps)
        kernel -= self.scale[:, None]
        numpy.exp(numpy.maximum(kernel, FLOOR, out=kernel), out=kernel)
        self.v.fill(1)
        if self.rho is not None:
            self.share = self.rho / (self.rho + eps)
            self._row_factor = self.a * numpy.exp((self.share - 1) * -self.scale)
            self._column_factor = self.b**self.share * numpy.exp((self.share - 1) * self.scaled_g)
        else:
            self.share = 1.0

    def sweep(self, times: int) -> None:
        """Sinkhorn steps: the rows are made exact, then the columns."""
        v, u, sums, columns = self.v, self._u, self._sums, self._columns
        for _ in range(times):
            self._rows()
            if self.rho is None:
                numpy.divide(self.a, sums, out=u)
                self._down()
                numpy.divide(self.b, columns, out=v)
            else:
                numpy.multiply(self._row_factor, sums**-self.share, out=u)
                self._down()
                numpy.multiply(self._column_factor, columns**-self.share, out=v)

    def _rows(self) -> None:
        """Sums of the rows of ``K diag(v)``."""
        for matrix, sums in self._across:
            numpy.dot(matrix, self.v, out=sums)

    def _down(self) -> Vector:
        """Sums of the columns of ``diag(u) K``."""
        for matrix, sums in self._along:
            numpy.dot(self._u, matrix, out=sums)
        return self._columns

    def look(self) -> Look:
        """Where the scaling is: the rows are made exact for it."""
        sums, a, b = self._sums, self.a, self.b
        w = numpy.log(self.v)
        self._rows()
        self.log_sums = numpy.log(sums) + self.scale
        if self.rho is None:
            numpy.divide(a, sums, out=self._u)
            self.columns = self._down() * self.v
            self.wanted, root_mass = b, self.root_mass
            value = float(b @ (self.scaled_g + w)) - float(a @ self.log_sums)
        else:
            numpy.multiply(self._row_factor, sums**-self.share, out=self._u)
            self.columns = self._down() * self.v
            density = numpy.maximum(numpy.exp((self.g + self.eps * w) * (-1 / self.rho)), TINY)
            self.wanted = b * density
            root_mass = max(math.sqrt(self.wanted.sum()), NOTHING * self.root_mass)
            transported = float((self._u * sums).sum())
            value = -(self.rho / self.eps + 1) * transported - self.rho / self.eps * float(self.wanted.sum())
        missing = self.wanted - self.columns
        error = math.sqrt(float(missing @ (missing / self.wanted))) / root_mass
        return Look(w, missing, error, value)

    def curvature(self, damping: float) -> Matrix:
        """Minus the second derivative of the dual value ``(M, M)`` in ``w``, at the last look: its lower half.

        ``damping`` is the share of the weights by which its diagonal grows. Without it, where mass is conserved, the matrix would be
        singular, because a constant changes nothing.
        """
        root = numpy.multiply(self.kernel, self.v, out=self._plan)
        root *= numpy.sqrt(self._u / self._sums)[:, None]
        diagonal = self.columns + damping * self.b
        if self.rho is not None:
            diagonal += self.wanted * (self.eps / self.rho)
        if root.size * len(self.b) <= QUIET[1]:
            from scipy.linalg.blas import dsyrk  # a third of a second, for those alone who need it

            matrix = dsyrk(-self.share, root.T, c=self._matrix, lower=1, overwrite_c=1)
        else:
            matrix = product(root.T, root).T
            matrix *= -self.share
        matrix.reshape(-1, order="F")[:: len(matrix) + 1] += diagonal
        return matrix

    def answer(self) -> Vector:
        """What balanced rows answer to the last look."""
        return -self.eps * self.log_sums

    def solved(self, look: Look, n_iter: int) -> Potentials:
        """The last look, as a solution."""
        plan = numpy.multiply(self.kernel, self.v, out=self._plan)
        plan *= self._u[:, None]
        return Potentials(
            -(self.eps * self.share) * self.log_sums, self.g + self.eps * look.w, plan, n_iter, look.error
        )

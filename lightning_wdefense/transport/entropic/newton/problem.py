"""Small problems on a CPU, solved one by one in NumPy and float64, from the cost to the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.entropic.newton.kernel import (
    Cloud,
    Matrix,
    Potentials,
    answer,
    cloud,
    density,
    displacements,
    half_squared_distances,
    price,
)
from lightning_wdefense.transport.entropic.newton.method import newton
from lightning_wdefense.transport.entropic.newton.symmetric import averaged
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Needed, Pair
from lightning_wdefense.transport.entropic.problem.costs import distance
from lightning_wdefense.transport.entropic.problem.problem import Problem
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.entropic.solver.optimum import IDENTITY, Optimum, Transports, optimum, solved, stacked

SMALL = 192
"""Number of points of the larger cloud up to which Newton's method is faster."""

FEW = 8
"""Number of problems of a batch up to which solving them one by one by Newton's method is faster than all at once."""


@dataclass(frozen=True)
class SmallProblem(Problem):
    """:class:`~lightning_wdefense.transport.entropic.problem.problem.Problem` with its measures in NumPy too, by their names."""

    clouds: Mapping[str, Cloud]
    alone: bool
    """Whether it is the only one of its batch. Results then have the axis of the batch at once."""

    def dense_cost(self, pair: Pair) -> Matrix:
        """:meth:`ground_cost`."""
        if not self._geometric_alone or self.options.label_cost is not None:
            return self.ground_cost(pair).rows().double().numpy()
        if pair == "xy":
            return self._dense_between
        cloud = self.clouds[pair[0]]
        return half_squared_distances(cloud, cloud, self.eps)

    def distances(self, pair: Pair) -> Matrix:
        """Distances between the points."""
        x, y = self.measures(pair)
        return distance(x.points, y.points).rows().double().numpy()

    @cached_property
    def blur(self) -> Tensor:
        """That of the parent; with the axis of the batch if that is of one."""
        options, dtype = self.options, self.clouds["x"].given.dtype
        if options.blur is None:
            blur = super().blur.numpy()
        else:
            blur = numpy.array(max(options.blur, float(numpy.finfo(dtype).tiny) ** (0.5 / options.p)), dtype)
        return torch.from_numpy(blur[None] if self.alone else blur)

    @cached_property
    def eps(self) -> float:
        """Temperature."""
        return float(self.blur.numpy().reshape(())[()] ** self.options.p)

    @cached_property
    def mean(self) -> float:
        """Mean cost, to which the price of labels is added."""
        return float(self._mean) + (self.options.label_cost or 0.0)

    @cached_property
    def _mean(self) -> Tensor:
        if not self._geometric_alone:
            return super()._mean
        x, y = self.clouds["x"], self.clouds["y"]
        squares = float(x.weights @ x.half_squares) / x.mass + float(y.weights @ y.half_squares) / y.mass
        product = float((x.weights @ x.points) @ (y.weights @ y.points)) / (x.mass * y.mass)
        return torch.from_numpy(numpy.array(max(0.0, squares - product), x.given.dtype))

    @cached_property
    def _dense_between(self) -> Matrix:
        return half_squared_distances(self.clouds["x"], self.clouds["y"], self.eps)

    @property
    def _geometric_alone(self) -> bool:
        return not self.matrices and self.options.p == 2


def suits(size: int, n: int, m: int, device: torch.device) -> bool:
    """Whether ``size`` problems ``(N, M)`` are few, small and on a CPU."""
    return device.type == "cpu" and max(n, m) <= SMALL and size <= FEW


def transports(arguments: Arguments, start: Tensor | None, work: Workspace) -> Transports:
    """As :func:`lightning_wdefense.transport.entropic.solver.optimum.transports`, for calls that :func:`suits`."""
    return solved(_problems(arguments, work), _solved, arguments.pairs, arguments.needed, start)


def _problems(arguments: Arguments, work: Workspace) -> Iterator[SmallProblem]:
    x, y, options, matrices, *_ = arguments.detached()
    size, labels = len(x.points), (x.labels, y.labels)
    arrays = [(each.points.numpy(), each.weights.numpy()) for each in (x, y)]
    for i in range(size):
        points, weights = zip(
            *((p[i].astype(numpy.float64), w[i].astype(numpy.float64)) for p, w in arrays), strict=True
        )
        masses = [float(each.sum()) for each in weights]
        centre = (weights[0] @ points[0]) / (2 * masses[0]) + (weights[1] @ points[1]) / (2 * masses[1])
        for each in points:
            each -= centre
        clouds = [cloud(*each, arrays[0][0].dtype) for each in zip(points, weights, masses, strict=True)]
        around_zero = [
            Measure(torch.from_numpy(c.given[:, :-1]), torch.from_numpy(w[i]), None if label is None else label[i])
            for c, (_, w), label in zip(clouds, arrays, labels, strict=True)
        ]
        own = {pair: each[i] for pair, each in matrices.items()}
        yield SmallProblem(
            around_zero[0], around_zero[1], options, own, work, {"x": clouds[0], "y": clouds[1]}, alone=size == 1
        )


def _solved(problem: SmallProblem, pair: Pair, needed: Needed, start: Tensor | None) -> Optimum:
    """The optimum by Newton's method; where that fails, by the solver for problems of any size."""
    found = _between(problem, start) if pair == "xy" else _within(problem, pair)
    result = None if found is None else _optimum(problem, pair, needed.of(pair), found)
    if result is not None:
        return result
    result = optimum(problem, pair, needed, start)
    return stacked([result]) if problem.alone else result


def _optimum(problem: SmallProblem, pair: Pair, needed: Needed, found: Potentials) -> Optimum | None:
    options, eps, rho = problem.options, problem.eps, problem.options.rho
    x, y = (problem.clouds[name] for name in pair)
    f, g, plan, n_iter, error = found
    moved = x.mass if rho is None else float(x.weights @ density(f, rho))
    value = float(x.weights @ price(f, rho)) + float(y.weights @ price(g, rho)) - eps * (moved - x.mass * y.mass)
    if not math.isfinite(value):
        return None
    of_x = of_y = None
    stays = pair != "xy" and moved - float(plan.trace()) < IDENTITY * options.tol * x.mass
    if not (needed.cost or stays) and (needed.x or needed.y):
        shares = plan
        if options.p == 1:
            distances = problem.distances(pair)
            shares = numpy.where(distances > 0, plan / distances, 0)
        of_x = displacements(shares, x, y) if needed.x else None
        of_y = displacements(shares.T, y, x) if needed.y and pair == "xy" else None
    on_x, dtype = f if pair == "xy" else g, x.given.dtype

    def tensor(values: Any) -> Tensor:
        result = numpy.array(values, dtype)
        return torch.from_numpy(result[None] if problem.alone else result)

    return Optimum(
        value=tensor(value),
        f=tensor(f),
        g=tensor(g),
        n_iter=n_iter,
        error=tensor(error),
        of_x=None if of_x is None else tensor(of_x),
        of_y=None if of_y is None else tensor(of_y),
        of_a=tensor(price(on_x, rho) - eps * (density(on_x, rho) - y.mass)) if needed.a else None,
        of_b=tensor(price(g, rho) - eps * (density(g, rho) - x.mass)) if needed.b else None,
        of_cost=tensor(plan) if needed.cost else None,
    )


def _between(problem: SmallProblem, start: Tensor | None) -> Potentials | None:
    """Potentials of the transport of one measure to the other; points without weight answer to the others."""
    options, cost, eps, mean = problem.options, problem.dense_cost("xy"), problem.eps, problem.mean
    a, b, rho = problem.clouds["x"].weights, problem.clouds["y"].weights, options.rho
    if not (math.isfinite(eps) and math.isfinite(mean)):
        return None
    settings: dict[str, Any] = {"mean": mean, "tol": options.tol, "max_iter": options.max_iter}
    first, kept = None if start is None else start.numpy().astype(numpy.float64), b > 0
    if kept.all():
        return newton(cost, a, b, eps, rho, start=first, **settings)
    first = None if first is None else first[kept]
    found = newton(numpy.ascontiguousarray(cost[:, kept]), a, b[kept], eps, rho, start=first, **settings)
    if found is None:
        return None
    g, plan = answer(cost.T, a, found.f, eps, rho), numpy.zeros_like(cost)
    g[kept], plan[:, kept] = found.g, found.plan
    return found._replace(g=g, plan=plan)


def _within(problem: SmallProblem, pair: Pair) -> Potentials | None:
    """Potentials of the transport of a measure to itself, likewise."""
    options, eps = problem.options, problem.eps
    # Of a cost of the caller's, nobody knows that it is zero from each point to itself.
    if problem.matrices or not math.isfinite(eps):
        return None
    cost, a, rho = problem.dense_cost(pair), problem.clouds[pair[0]].weights, options.rho
    kept = a > 0
    if kept.all():
        return averaged(cost, a, eps, rho, tol=options.tol, max_iter=options.max_iter)
    block = numpy.ix_(kept, kept)
    found = averaged(cost[block], a[kept], eps, rho, tol=options.tol, max_iter=options.max_iter)
    if found is None:
        return None
    f, plan = answer(cost[:, kept], a[kept], found.g, eps, rho), numpy.zeros_like(cost)
    g = f.copy()
    g[kept], plan[block] = found.g, found.plan
    return found._replace(f=f, g=g, plan=plan)

"""Small problems on a CPU, solved one by one: from the cost to the gradient in NumPy and in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_wdefense.transport.averaging import averaged
from lightning_wdefense.transport.costs import distance
from lightning_wdefense.transport.dense import (
    Cloud,
    Matrix,
    Potentials,
    answer,
    density,
    displacements,
    half_squared_distances,
    price,
)
from lightning_wdefense.transport.measures import Measure
from lightning_wdefense.transport.newton import newton
from lightning_wdefense.transport.optimum import IDENTITY, Needed, Optimum, optimum
from lightning_wdefense.transport.options import SinkhornOptions
from lightning_wdefense.transport.problem import Pair, Problem
from lightning_wdefense.transport.workspace import Workspace

SMALL = 192
"""Points of the larger cloud up to which Newton's method is worth its matrix."""


def is_small(x: Measure, y: Measure) -> bool:
    """Whether these problems are solved here."""
    return x.points.device.type == "cpu" and max(x.weights.shape[-1], y.weights.shape[-1]) <= SMALL


@dataclass(frozen=True)
class SmallProblem(Problem):
    """:class:`~.problem.Problem` with its measures in NumPy too, by their names."""

    clouds: Mapping[str, Cloud]

    def dense_cost(self, pair: Pair) -> Matrix:
        """:meth:`ground_cost`."""
        if not self._geometric_alone or self.options.label_cost is not None:
            return self.ground_cost(pair).rows().double().numpy()
        if pair == "xy":
            return self._dense_between
        points = self.clouds[pair[0]].points
        return half_squared_distances(points, points)

    def distances(self, pair: Pair) -> Matrix:
        """Distances between the points."""
        x, y = self.measures(pair)
        return distance(x.points, y.points).rows().double().numpy()

    @cached_property
    def blur(self) -> Tensor:
        """That of the parent, for which PyTorch takes its time."""
        options, dtype = self.options, self.x.weights.dtype
        if options.blur is None:
            return super().blur
        return torch.tensor(max(options.blur, torch.finfo(dtype).tiny ** (0.5 / options.p)), dtype=dtype)

    @cached_property
    def _mean(self) -> Tensor:
        if not self._geometric_alone:
            return super()._mean
        x, y = self.clouds["x"], self.clouds["y"]
        mean = float(x.weights @ self._dense_between @ y.weights) / (x.mass * y.mass)
        return torch.tensor(mean, dtype=self.x.weights.dtype)

    @cached_property
    def _dense_between(self) -> Matrix:
        return half_squared_distances(self.clouds["x"].points, self.clouds["y"].points)

    @property
    def _geometric_alone(self) -> bool:
        return not self.matrices and self.options.p == 2


def small_problems(
    x: Measure, y: Measure, options: SinkhornOptions, matrices: Mapping[Pair, Tensor], work: Workspace
) -> Iterator[SmallProblem]:
    """:func:`~.problem.solved_at_once`, each problem of the batch by itself."""
    measures = x.detached(), y.detached()
    arrays = [(each.points.numpy(), each.weights.numpy()) for each in measures]
    for i in range(len(x.points)):
        points, weights = zip(*((p[i].astype(numpy.float64), w[i].astype(numpy.float64)) for p, w in arrays), strict=True)
        masses = [float(w.sum()) for w in weights]
        centre = sum(w @ p / (2 * mass) for p, w, mass in zip(points, weights, masses, strict=True))
        for each in points:
            each -= centre
        clouds = dict(zip("xy", map(Cloud, points, weights, masses), strict=True))
        centred = (
            each.problem(i)._replace(points=torch.from_numpy(p.astype(a.dtype)))
            for each, p, (a, _) in zip(measures, points, arrays, strict=True)
        )
        own = {pair: each[i].detach() for pair, each in matrices.items()}
        yield SmallProblem(*centred, options, own, work, clouds)


def small_optimum(problem: SmallProblem, pair: Pair, needed: Needed, start: Tensor | None = None) -> Optimum:
    """:func:`~.optimum.optimum` of a small problem."""
    found = _between(problem, start) if pair == "xy" else _within(problem, pair)
    result = None if found is None else _optimum(problem, pair, needed.of(pair), found)
    return optimum(problem, pair, needed, start) if result is None else result


def _optimum(problem: SmallProblem, pair: Pair, needed: Needed, found: Potentials) -> Optimum | None:
    options, eps, rho = problem.options, float(problem.eps), problem.options.rho
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
        of_x = displacements(shares, x.points, y.points) if needed.x else None
        of_y = displacements(shares.T, y.points, x.points) if needed.y and pair == "xy" else None
    on_x, dtype = f if pair == "xy" else g, problem.x.weights.numpy().dtype

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(numpy.array(values, dtype))

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
    options, cost, eps, mean = problem.options, problem.dense_cost("xy"), float(problem.eps), float(problem.mean)
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
    options, eps = problem.options, float(problem.eps)
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

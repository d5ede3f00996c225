"""The optimum of a small problem on a CPU, from the cost to the gradient in NumPy and in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
from torch import Tensor

from lightning_wdefense.transport.averaging import averaged
from lightning_wdefense.transport.dense import Potentials, Vector, answer, density, displacements, price
from lightning_wdefense.transport.newton import newton
from lightning_wdefense.transport.optimum import IDENTITY, Needed, Optimum
from lightning_wdefense.transport.problem import Pair, Problem


def small_optimum(problem: Problem, pair: Pair, needed: Needed, start: Tensor | None = None) -> Optimum | None:
    """:func:`~.optimum.optimum` of a small problem; ``None`` where that has to find it, because this did not."""
    # Of a cost of the caller's, nobody knows that it is zero from each point to itself.
    if not problem.small or (problem.matrices and pair != "xy"):
        return None
    found = _between(problem, start) if pair == "xy" else _within(problem, pair)
    if found is None:
        return None
    (x, y), needed, options = problem.measures(pair), needed.of(pair), problem.options
    a, b, eps, rho = _array(x.weights), _array(y.weights), float(problem.eps), options.rho
    f, g, plan, n_iter, error = found
    mass_a, mass_b, moved = float(a.sum()), float(b.sum()), float((a * density(f, rho)).sum())
    value = float(a @ price(f, rho)) + float(b @ price(g, rho)) - eps * (moved - mass_a * mass_b)
    if not math.isfinite(value):
        return None
    of_x = of_y = None
    stays = pair != "xy" and moved - float(plan.trace()) < IDENTITY * options.tol * mass_a
    if not (needed.cost or stays) and (needed.x or needed.y):
        points_x, points_y = problem.dense_points[pair[0]], problem.dense_points[pair[1]]
        shares = plan
        if options.p == 1:
            distances = problem.dense_distances(pair)
            shares = numpy.where(distances > 0, plan / distances, 0)
        of_x = displacements(shares, points_x, points_y) if needed.x else None
        of_y = displacements(shares.T, points_y, points_x) if needed.y and pair == "xy" else None
    on_x = f if pair == "xy" else g
    dtype = x.weights.numpy().dtype

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
        of_a=tensor(price(on_x, rho) - eps * (density(on_x, rho) - mass_b)) if needed.a else None,
        of_b=tensor(price(g, rho) - eps * (density(g, rho) - mass_a)) if needed.b else None,
        of_cost=tensor(plan) if needed.cost else None,
    )


def _between(problem: Problem, start: Tensor | None) -> Potentials | None:
    """Potentials of the transport of one measure to the other; points without weight answer to the others."""
    options, cost = problem.options, problem.dense_cost("xy")
    a, b, eps, rho, mean = (
        _array(problem.x.weights),
        _array(problem.y.weights),
        float(problem.eps),
        options.rho,
        float(problem.mean),
    )
    if not (math.isfinite(eps) and math.isfinite(mean)):
        return None
    settings: dict[str, Any] = {"mean": mean, "tol": options.tol, "max_iter": options.max_iter}
    first, kept = None if start is None else _array(start), b > 0
    if kept.all():
        return newton(cost, a, b, eps, rho, start=first, **settings)
    first = None if first is None else first[kept]
    found = newton(numpy.ascontiguousarray(cost[:, kept]), a, b[kept], eps, rho, start=first, **settings)
    if found is None:
        return None
    g, plan = answer(cost.T, a, found.f, eps, rho), numpy.zeros_like(cost)
    g[kept], plan[:, kept] = found.g, found.plan
    return found._replace(g=g, plan=plan)


def _within(problem: Problem, pair: Pair) -> Potentials | None:
    """Potentials of the transport of a measure to itself, likewise."""
    options, cost = problem.options, problem.dense_cost(pair)
    a, eps, rho = _array(problem.measures(pair)[0].weights), float(problem.eps), options.rho
    if not math.isfinite(eps):
        return None
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


def _array(tensor: Tensor) -> Vector:
    return tensor.numpy().astype(numpy.float64)

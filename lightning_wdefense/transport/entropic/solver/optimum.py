"""The optimal value of a transport and its gradient, by the envelope theorem.

At the optimum, the derivative of an optimal value is that of the objective with the solution held fixed (Danskin), so that
nothing of the iterations that found it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.problem.problem import Pair, Problem
from lightning_wdefense.transport.entropic.solver.dual import density, price, semi_dual
from lightning_wdefense.transport.entropic.solver.potentials import Solution, solve
from lightning_wdefense.transport.entropic.solver.symmetric import solve_symmetric


class Needed(NamedTuple):
    """Gradients that somebody will ask for."""

    x: bool
    y: bool
    a: bool
    b: bool
    cost: bool

    def of(self, pair: Pair) -> Needed:
        """Those that the transport between two of the measures contributes to."""
        if pair == "xy":
            return self
        points, weights = (self.x, self.a) if pair == "xx" else (self.y, self.b)
        return Needed(points, points, weights, weights, self.cost)


IDENTITY = 0.1
"""Share of the tolerance below which mass that leaves its point, in a transport to itself, does not count."""


class Optimum(NamedTuple):
    """Solved transports: value ``(...)``, potentials ``(..., N)`` and ``(..., M)``, convergence, and needed gradients.

    ``of_cost`` is the plan ``(..., N, M)``. ``None`` is a gradient that nobody needs, or that is zero. For the transport of a
    measure to itself the gradients are half of the whole ones: those of one of the two arguments.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    n_iter: int
    error: Tensor
    of_x: Tensor | None
    of_y: Tensor | None
    of_a: Tensor | None
    of_b: Tensor | None
    of_cost: Tensor | None


def optimum(problem: Problem, pair: Pair, needed: Needed, start: Tensor | None = None) -> Optimum:
    """Solve the transport between two measures of a problem, from the potential ``start`` if it is given."""
    options, eps, rho = problem.options, problem.eps, problem.options.rho
    (x, y), cost, needed = problem.measures(pair), problem.ground_cost(pair), needed.of(pair)
    a, b, tol, max_iter = x.weights, y.weights, options.tol, options.max_iter
    if pair == "xy":
        solution = solve(cost, a, b, eps, rho, problem.work, mean=problem.mean, tol=tol, max_iter=max_iter, start=start)
    else:
        solution = solve_symmetric(cost, a, eps, rho, problem.work, tol=tol, max_iter=max_iter)
    f, g, n_iter, error, kernel = solution
    of_x = of_y = None
    if not needed.cost and (needed.x or needed.y):
        of_x, of_y = _of_points(problem, pair, needed, solution)
    return Optimum(
        value=semi_dual(f, g, a, b, eps if isinstance(eps, float) else eps[:, 0], rho).to(a.dtype),
        f=f,
        g=g,
        n_iter=n_iter,
        error=error,
        of_x=of_x,
        of_y=of_y,
        of_a=of_weights(f if pair == "xy" else g, b, eps, rho) if needed.a else None,
        of_b=of_weights(g, a, eps, rho) if needed.b else None,
        of_cost=kernel.plan() if needed.cost else None,
    )


def stacked(optima: Sequence[Optimum]) -> Optimum:
    """Problems that were solved one by one, as a batch."""
    if len(optima) == 1 and optima[0].value.ndim == 1:
        return optima[0]

    def stack(values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], int):
            return max(values)
        known = [value for value in values if value is not None]
        if not known:
            return None
        return torch.stack([torch.zeros_like(known[0]) if value is None else value for value in values])

    return Optimum(*(stack(values) for values in zip(*optima, strict=True)))


def of_weights(potential: Tensor, others: Tensor, eps: float | Tensor, rho: float | None) -> Tensor:
    """Derivative ``(..., N)`` of the value in the weights of the potential's side."""
    return price(potential, rho) - eps * (density(potential, rho) - others.sum(-1, keepdim=True))


def _of_points(problem: Problem, pair: Pair, needed: Needed, solution: Solution) -> tuple[Tensor | None, Tensor | None]:
    x, y = problem.measures(pair)
    if pair != "xy" and _stays(x.weights, solution.g, problem):
        return None, None
    return solution.kernel.displacements(x.points, y.points, of_x=needed.x, of_y=needed.y and pair == "xy")


def _stays(weights: Tensor, potential: Tensor, problem: Problem) -> bool:
    """Whether in a transport to itself all mass stays where it is: then nothing depends on the points."""
    # A point without weight may have any potential, so its exponent may be too large.
    potential = torch.where(weights > 0, potential, 0)
    remains = (weights.square() * (2 * potential / problem.eps).exp()).sum(-1)
    moved = (weights * density(potential, problem.options.rho)).sum(-1) - remains
    return bool((moved < IDENTITY * problem.options.tol * weights.sum(-1)).all())

"""The optimal value of a transport and its gradient, by the envelope theorem.

At the optimum, the derivative of an optimal value is that of the objective with the solution held fixed (Danskin), so that
nothing of the iterations has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic import triton
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Needed, Pair
from lightning_wdefense.transport.entropic.problem.problem import Problem, problems
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.entropic.solver.dual import density, price, semi_dual
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel
from lightning_wdefense.transport.entropic.solver.potentials import solve
from lightning_wdefense.transport.entropic.solver.shared import SharedKernel
from lightning_wdefense.transport.entropic.solver.symmetric import solve_symmetric
from lightning_wdefense.transport.entropic.solver.tiled import TiledKernel

IDENTITY = 0.1
"""Share of the tolerance below which mass that leaves its point counts as none, in a transport of a measure to itself."""


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


class Transports(NamedTuple):
    """The solved transports of a call by pair, and the blur ``(B,)``, in units of the distance."""

    optima: Mapping[Pair, Optimum]
    blur: Tensor


P = TypeVar("P", bound=Problem)


def transports(arguments: Arguments, start: Tensor | None, work: Workspace) -> Transports:
    """Solve all transports of a call, the first one from the potential ``start`` ``(B, M)`` if it is given."""
    return solved(problems(arguments, work), optimum, arguments.pairs, arguments.needed, start)


def solved(
    parts: Iterable[P],
    solve: Callable[[P, Pair, Needed, Tensor | None], Optimum],
    pairs: Sequence[Pair],
    needed: Needed,
    start: Tensor | None,
) -> Transports:
    """What ``solve`` finds of each part of a batch, as a batch."""
    results, blurs = [], []
    for i, problem in enumerate(parts):
        here = start if start is None or problem.x.weights.ndim == 2 else start[i]
        results.append([solve(problem, pair, needed, here if pair == "xy" else None) for pair in pairs])
        blurs.append(problem.blur)
    optima = {pair: stacked(each) for pair, each in zip(pairs, zip(*results, strict=True), strict=True)}
    return Transports(optima, blurs[0] if blurs[0].ndim else torch.stack(blurs))


def optimum(problem: Problem, pair: Pair, needed: Needed, start: Tensor | None = None) -> Optimum:
    """Solve the transport between two measures of a problem, from the potential ``start`` if it is given."""
    options, eps, rho = problem.options, problem.eps, problem.options.rho
    (x, y), cost, needed = problem.measures(pair), problem.ground_cost(pair), needed.of(pair)
    a, b, tol, max_iter = x.weights, y.weights, options.tol, options.max_iter
    kernel: GibbsKernel
    # Of large clouds on a GPU Triton makes the kernel tile by tile.
    large = cost.points is not None and cost.too_large(a) and a.ndim == 1 and a.dtype == torch.float32
    if problem.share is not None:
        kernel = SharedKernel(cost, problem.transposed_cost, a, b, rho, problem.work, problem.share)
    else:
        kernel = (TiledKernel if large and triton.available(a.device) else GibbsKernel)(cost, a, b, rho, problem.work)
    if pair == "xy":
        solution = solve(kernel, eps, mean=problem.mean, tol=tol, max_iter=max_iter, start=start)
    else:
        solution = solve_symmetric(kernel, eps, tol=tol, max_iter=max_iter)
    f, g, n_iter, error = solution
    of_x = of_y = None
    if not needed.cost and (needed.x or needed.y):
        of_x, of_y = _of_points(problem, pair, needed, kernel, g)
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


def _of_points(
    problem: Problem, pair: Pair, needed: Needed, kernel: GibbsKernel, g: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    x, y = problem.measures(pair)
    if pair != "xy" and _stays(x.weights, g, problem):
        return None, None
    return kernel.displacements(x.points, y.points, of_x=needed.x, of_y=needed.y and pair == "xy")


def _stays(weights: Tensor, potential: Tensor, problem: Problem) -> bool:
    """Whether in a transport to itself all mass stays where it is: then nothing depends on the points."""
    # A point without weight may have any potential, so its exponent may be too large.
    potential = torch.where(weights > 0, potential, 0)
    remains = (weights.square() * (2 * potential / problem.eps).exp()).sum(-1)
    moved = (weights * density(potential, problem.options.rho)).sum(-1) - remains
    return bool((moved < IDENTITY * problem.options.tol * weights.sum(-1)).all())

"""From the arguments of the Sinkhorn functions to a value with its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.clouds.measures import Measure, read_measures
from lightning_wdefense.transport.clouds.precision import exact_products
from lightning_wdefense.transport.entropic import triton
from lightning_wdefense.transport.entropic.gpu.graphs import attempt_again
from lightning_wdefense.transport.entropic.gradients.envelope import with_gradients
from lightning_wdefense.transport.entropic.gradients.second_order import (
    WEIGHT,
    euclidean_cost,
    gradients_of_weights_and_costs,
)
from lightning_wdefense.transport.entropic.newton.problem import problems, solved_optimum
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.entropic.problem.costs import checked_cost, label_disagreement
from lightning_wdefense.transport.entropic.problem.problem import Pair
from lightning_wdefense.transport.entropic.problem.workspace import workspace
from lightning_wdefense.transport.entropic.solver.optimum import Needed, Optimum, stacked
from lightning_wdefense.transport.entropic.warm_start import WarmStart


class Given(NamedTuple):
    """What was passed, as it was passed; ``debias`` asks for the transports of both measures to themselves too."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    x_labels: Tensor | None
    y_labels: Tensor | None
    options: SinkhornOptions
    debias: bool


class Arguments(NamedTuple):
    """What was passed, checked: batched measures with their graphs, and the caller's own costs ``(B, N, M)`` with theirs."""

    x: Measure
    y: Measure
    options: SinkhornOptions
    matrices: Mapping[Pair, Tensor]
    pairs: tuple[Pair, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the value depends on: points or the caller's costs, then weights."""
        points = tuple(self.matrices.values()) or (self.x.points, self.y.points)
        return *points, self.x.weights, self.y.weights


class Evaluation(NamedTuple):
    """Value ``(B,)`` with its gradient, the transports it is made of, and the blur ``(B,)``.

    ``judged`` is whether the errors are known to be below the tolerance already.
    """

    value: Tensor
    optima: Mapping[Pair, Optimum]
    blur: Tensor
    judged: bool = False


def read_arguments(given: Given, claims: list[Tensor] | None = None) -> Arguments:
    """Check the arguments; ``claims`` is as for :func:`~.measures.read_measures`."""
    x, y, a, b, x_labels, y_labels, options, debias = given
    if options.label_cost is not None and (x_labels is None or y_labels is None):
        missing = " and ".join(name for name in ("x_labels", "y_labels") if getattr(given, name) is None)
        raise ValueError(f"label_cost={options.label_cost} needs labels: pass {missing}, or label_cost=None.")
    source, target = read_measures(
        *(x, y, a, b, x_labels, y_labels),
        balanced=options.rho is None,
        own_cost=callable(options.cost),
        claims=claims,
    )
    pairs: tuple[Pair, ...] = ("xy", "xx", "yy") if debias else ("xy",)
    matrices: dict[Pair, Tensor] = {}
    if options.cost == "cosine":
        # Between directions, 1 - cos(x, y) is half the squared distance.
        source, target = (m._replace(points=F.normalize(m.points, dim=-1)) for m in (source, target))
        options = replace(options, cost=None)
    elif callable(options.cost):
        cost, points = checked_cost(options.cost, batched=x.ndim == 3), {"x": source.points, "y": target.points}
        matrices = {pair: cost(points[pair[0]], points[pair[1]]) for pair in pairs}
        options = replace(options, cost=cost)
    return Arguments(source, target, options, matrices, pairs)


def read_and_evaluate(given: Given, warm_start: WarmStart | None = None) -> tuple[Arguments, Evaluation]:
    """:func:`read_arguments` and :func:`evaluate`, on a GPU without waiting for it if that turns out to be good enough."""
    guess = _speculate(given, warm_start)
    if guess is not None:
        return guess
    arguments = read_arguments(given)
    return arguments, evaluate(arguments, warm_start)


@torch.compiler.disable
def _speculate(given: Given, warm_start: WarmStart | None) -> tuple[Arguments, Evaluation] | None:
    if not isinstance(given.x, Tensor) or not triton.available(given.x.device) or callable(given.options.cost):
        return None
    claims: list[Tensor] = []
    arguments = read_arguments(given, claims)
    needed = _needed(arguments)
    start = None if warm_start is None else warm_start.recall(arguments.y.weights)
    weighted = given.a is not None or given.b is not None
    with torch.no_grad(), exact_products():
        guess = attempt_again(
            *(arguments.x, arguments.y, arguments.options, arguments.pairs, needed, start), weighted=weighted
        )
        if guess is None:
            return None
        value = _total(guess.optima)
    value = _differentiable(value, arguments, needed, guess.optima, guess.blur)
    n_iter = guess.passed(claims)
    if n_iter is None:
        return None
    optima = {**guess.optima, "xy": guess.optima["xy"]._replace(n_iter=n_iter)}
    if warm_start is not None:
        warm_start.potential = optima["xy"].g
    return arguments, Evaluation(value, optima, guess.blur, judged=True)


@torch.compiler.disable
def evaluate(arguments: Arguments, warm_start: WarmStart | None = None) -> Evaluation:
    """Solve the transports; the value is that of the first, less half of those of the measures to themselves."""
    x, y, options, matrices, pairs = arguments
    needed = _needed(arguments)
    start = None if warm_start is None else warm_start.recall(y.weights)
    solved, blurs = [], []
    # Steps of the iteration that lead nowhere may overflow: they are taken back.
    with torch.no_grad(), exact_products(), numpy.errstate(all="ignore"), workspace() as work:
        for i, problem in enumerate(problems(x, y, options, matrices, work)):
            here = start if start is None or problem.x.weights.ndim == 2 else start[i]
            solved.append([solved_optimum(problem, pair, needed, here if pair == "xy" else None) for pair in pairs])
            blurs.append(problem.blur)
        optima = {pair: stacked(each) for pair, each in zip(pairs, zip(*solved, strict=True), strict=True)}
        blur = blurs[0] if blurs[0].ndim else torch.stack(blurs)
        value = _total(optima)
    if warm_start is not None:
        warm_start.potential = optima["xy"].g  # whatever it is worth: the next call judges it
    return Evaluation(_differentiable(value, arguments, needed, optima, blur), optima, blur)


def _total(optima: Mapping[Pair, Optimum]) -> Tensor:
    total = optima["xy"].value
    for pair, each in optima.items():
        if pair != "xy":
            total = total.add(each.value, alpha=WEIGHT[pair])
    return total


def _differentiable(
    value: Tensor, arguments: Arguments, needed: Needed, optima: Mapping[Pair, Optimum], blur: Tensor
) -> Tensor:
    """The value as a function of the inputs. Uses up the gradients of the optima."""
    if not any(needed):
        return value
    gradients = _gradients(arguments, optima)
    unused: dict[str, Any] = dict.fromkeys(("of_x", "of_y", "of_a", "of_b", "of_cost"))
    solutions = {pair: each._replace(**unused) for pair, each in optima.items()}
    return with_gradients(
        value,
        arguments.inputs,
        gradients,
        lambda *inputs: _differentiable_gradients(arguments, inputs, solutions, blur**arguments.options.p),
    )


def _needed(arguments: Arguments) -> Needed:
    x, y, _, matrices, _ = arguments
    tensors = x.points, y.points, x.weights, y.weights
    points_x, points_y, a, b = (torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)
    if not matrices:
        return Needed(points_x, points_y, a, b, cost=False)
    return Needed(False, False, a, b, torch.is_grad_enabled() and any(m.requires_grad for m in matrices.values()))


def _gradients(arguments: Arguments, optima: Mapping[Pair, Optimum]) -> list[Tensor | None]:
    xy, within_x, within_y = optima["xy"], optima.get("xx"), optima.get("yy")
    of_x, of_y, of_a, of_b = xy.of_x, xy.of_y, xy.of_a, xy.of_b
    if within_x is not None and within_y is not None:
        pairs = (of_x, within_x.of_x), (of_y, within_y.of_x), (of_a, within_x.of_a), (of_b, within_y.of_a)
        of_x, of_y, of_a, of_b = (one if one is None or other is None else one.sub_(other) for one, other in pairs)
    if arguments.matrices:
        plans = [None if each.of_cost is None else WEIGHT[pair] * each.of_cost for pair, each in optima.items()]
        return [*plans, of_a, of_b]
    return [of_x, of_y, of_a, of_b]


def _differentiable_gradients(
    arguments: Arguments, inputs: tuple[Tensor, ...], optima: Mapping[Pair, Optimum], eps: Tensor
) -> list[Tensor | None]:
    """The gradients once more, as functions of the inputs."""
    *points, a, b = inputs
    options, labels = arguments.options, {"x": arguments.x.labels, "y": arguments.y.labels}
    if arguments.matrices:
        geometric = dict(zip(arguments.matrices, points, strict=True))
    else:
        clouds = dict(zip("xy", points, strict=True))
        geometric = {pair: euclidean_cost(clouds[pair[0]], clouds[pair[1]], options.p) for pair in arguments.pairs}
    costs = dict(geometric)
    for pair in costs:
        one, other = labels[pair[0]], labels[pair[1]]
        if options.label_cost is not None and one is not None and other is not None:
            costs[pair] = costs[pair] + options.label_cost * label_disagreement(one, other, a.dtype)
    plans, of_a, of_b = gradients_of_weights_and_costs(costs, a, b, optima, eps, options.rho)
    if arguments.matrices:
        return [*plans.values(), of_a, of_b]
    wanted = [cloud for cloud in points if cloud.requires_grad]
    depending = [pair for pair, cost in geometric.items() if cost.requires_grad]
    of_points = iter(
        torch.autograd.grad(
            [geometric[pair] for pair in depending],
            wanted,
            [plans[pair] for pair in depending],
            create_graph=True,
        )
        if wanted
        else ()
    )
    return [*(next(of_points) if cloud.requires_grad else None for cloud in points), of_a, of_b]

"""The same quantities by geomloss, as an independent check with its own cost, iterations and gradients.

geomloss stops after one annealing sweep, so it has no tolerance. It takes one blur for a whole batch.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.entropic.gradients.envelope import with_gradients
from lightning_wdefense.transport.entropic.options import Cost, SinkhornOptions
from lightning_wdefense.transport.entropic.problem.arguments import Arguments
from lightning_wdefense.transport.entropic.problem.costs import label_disagreement
from lightning_wdefense.transport.entropic.problem.problem import Problem
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.entropic.solver.dual import density
from lightning_wdefense.transport.entropic.solver.optimum import Optimum, Transports

SCALING = 0.99
"""Ratio between two blurs of geomloss's annealing: its default of 0.5 leaves gradients 22% to 82% wrong."""


def geomloss_transports(arguments: Arguments) -> tuple[Tensor, Transports]:
    """What geomloss finds: the value with its gradients, and the transport with the marginal error of its potentials."""
    inputs = arguments.x.weights, arguments.x.points, arguments.y.weights, arguments.y.points
    with torch.no_grad():
        x, y, options, matrices, *_ = arguments.detached()
        problem = Problem(x, y, options, matrices, Workspace())
        constants = [tensor.detach() for tensor in inputs]
        potentials = _run(problem, constants, debias=False, potentials=True)
        f, g = (torch.cat(each) for each in zip(*potentials, strict=True))
    debias = len(arguments.pairs) > 1
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    leaves = [constant.requires_grad_(differentiable) for constant in constants]
    value = torch.cat(_run(problem, leaves, debias=debias))
    if not debias:
        # geomloss drops the terms of its own definition that cancel in the divergence, and are zero for unit masses.
        mass_a, mass_b = leaves[0].sum(-1), leaves[2].sum(-1)
        value = value + problem.blur**options.p * (mass_a * mass_b - 0.5 * (mass_a + mass_b))
    if differentiable:
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        # Through fixed gradients, because geomloss's second derivatives are wrong: so they raise.
        value = with_gradients(value.detach(), inputs, gradients)
    error = _marginal_error(problem, f, g)
    of = dict.fromkeys(("of_x", "of_y", "of_a", "of_b", "of_cost"))
    optimum = Optimum(value.detach(), f, g, _temperatures(problem), error, **of)
    return value, Transports({"xy": optimum}, problem.blur)


def _run(problem: Problem, tensors: list[Tensor], **mode: bool) -> list[Any]:
    """Call geomloss on each problem of the batch by itself: it takes one blur for all."""
    losses = _geomloss()
    a, x, b, y = tensors
    options, cost = problem.options, problem.options.cost
    if options.label_cost is not None and problem.x.labels is not None and problem.y.labels is not None:
        # geomloss shows its cost function nothing but points, so labels travel as coordinates of them.
        x_labels, y_labels = _as_coordinates(problem.x.labels, problem.y.labels, x.dtype)
        x, y = torch.cat([x, x_labels], -1), torch.cat([y, y_labels], -1)
        cost = _labelled_cost(options, options.label_cost, x_labels.shape[-1])
    results = []
    for i, (blur, diameter) in enumerate(zip(problem.blur.tolist(), _diameters(problem).tolist(), strict=True)):
        one = slice(i, i + 1)
        loss = losses.SamplesLoss(
            "sinkhorn",
            p=options.p,
            blur=blur,
            reach=options.reach,
            diameter=diameter,
            scaling=SCALING,
            cost=cost,
            backend="tensorized",
            **mode,
        )
        # geomloss 0.3.1 leaves grad enabled behind it, and disabled if it raises.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            results.append(loss(a[one], x[one], b[one], y[one]))
    return results


def _geomloss() -> ModuleType:
    try:
        import geomloss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'solver="geomloss" needs geomloss: pip install "lightning-wdefense[geomloss]". The default, "native", does not.'
        ) from error
    return geomloss


def _labelled_cost(options: SinkhornOptions, label_cost: float, n_classes: int) -> Cost:
    """Cost between points whose last coordinates are class probabilities."""

    def cost(x: Tensor, y: Tensor) -> Tensor:
        points_x, points_y = x[..., :-n_classes], y[..., :-n_classes]
        if callable(options.cost):
            geometric = options.cost(points_x, points_y)
        else:
            geometric = torch.cdist(points_x, points_y) ** options.p / options.p
        return geometric + label_cost * label_disagreement(x[..., -n_classes:], y[..., -n_classes:], x.dtype)

    return cost


def _as_coordinates(x_labels: Tensor, y_labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels as class probabilities ``(B, N, K)`` and ``(B, M, K)``."""
    if x_labels.is_floating_point():
        return x_labels, y_labels
    classes, codes = torch.cat([x_labels, y_labels], -1).unique(return_inverse=True)
    one_hot = F.one_hot(codes, len(classes)).to(dtype)
    return one_hot[:, : x_labels.shape[1]], one_hot[:, x_labels.shape[1] :]


def _diameters(problem: Problem) -> Tensor:
    """Where geomloss's annealing starts, ``(B,)``: the largest distance between points with weight, unless the blur is larger."""
    weighty = (problem.x.weights.unsqueeze(-1) > 0) & (problem.y.weights.unsqueeze(-2) > 0)
    largest = torch.where(weighty, _cost(problem), 0).amax((-2, -1))
    return (largest ** (1 / problem.options.p)).maximum(problem.blur)


def _temperatures(problem: Problem) -> int:
    """Length of geomloss's annealing schedule, one iteration each."""
    ratio = float((_diameters(problem) / problem.blur).max())
    return 2 + math.ceil(math.log(ratio) / -math.log(SCALING))


def _marginal_error(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """Root mean square ``(B,)`` of the relative error of the plan's marginals, those of the worse side."""
    a, b, rho = problem.x.weights, problem.y.weights, problem.options.rho
    exponent = (f[:, :, None] + g[:, None, :] - _cost(problem)) / (problem.blur**problem.options.p)[:, None, None]
    plan = a[:, :, None] * b[:, None, :] * exponent.exp()
    errors = []
    for marginal, target in ((plan.sum(-1), a * density(f, rho)), (plan.sum(-2), b * density(g, rho))):
        square = torch.where(target > 0, (marginal - target).square() / target, 0)
        errors.append((square.sum(-1) / target.sum(-1)).sqrt())
    return errors[0].maximum(errors[1])


def _cost(problem: Problem) -> Tensor:
    return problem.ground_cost("xy").rows()

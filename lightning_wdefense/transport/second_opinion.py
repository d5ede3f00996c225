"""The same quantities by geomloss, to check ours against: end to end, its own cost, iterations and gradients.

geomloss stops after one annealing sweep, so that it has an accuracy but no tolerance, and takes one float of blur.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.costs import euclidean_cost, label_disagreement
from lightning_wdefense.transport.envelope import with_gradients
from lightning_wdefense.transport.options import Cost, SinkhornOptions
from lightning_wdefense.transport.problem import Problem
from lightning_wdefense.transport.solver import Potentials, density

SCALING = 0.99
"""Ratio between two blurs of geomloss's annealing: its default of 0.5 leaves gradients 22% to 82% wrong."""


def geomloss_value(problem: Problem, *, debias: bool) -> Tensor:
    """Optimal value ``(B,)``, or with ``debias`` the divergence, with geomloss's gradients to points and weights."""
    inputs = problem.x.weights, problem.x.points, problem.y.weights, problem.y.points
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    leaves = [tensor.detach().requires_grad_(differentiable) for tensor in inputs]
    value = torch.cat(_run(problem, leaves, debias=debias))
    if not debias:
        # geomloss drops the terms of its own definition that cancel in the divergence, and are zero for unit masses.
        mass_a, mass_b = leaves[0].sum(-1), leaves[2].sum(-1)
        value = value + problem.eps * (mass_a * mass_b - 0.5 * (mass_a + mass_b))
    if not differentiable:
        return value
    # Through fixed gradients, because geomloss's second derivatives are wrong: so they raise, as the native ones do.
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return with_gradients(value.detach(), inputs, gradients)


def geomloss_potentials(problem: Problem) -> Potentials:
    """Potentials of the transport of ``x`` to ``y``, and the marginal error that they leave."""
    inputs = problem.x.weights, problem.x.points, problem.y.weights, problem.y.points
    with torch.no_grad():
        potentials = _run(problem, [tensor.detach() for tensor in inputs], debias=False, potentials=True)
        f, g = (torch.cat(each) for each in zip(*potentials, strict=True))
        return Potentials(f, g, _temperatures(problem), _marginal_error(problem, f, g))


def _run(problem: Problem, tensors: list[Tensor], **mode: bool) -> list[Any]:
    """Call geomloss on each problem of the batch by itself: it knows one blur for all."""
    from geomloss import SamplesLoss

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
        loss = SamplesLoss(
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


def _labelled_cost(options: SinkhornOptions, label_cost: float, n_classes: int) -> Cost:
    """Cost between points whose last coordinates are class probabilities."""

    def cost(x: Tensor, y: Tensor) -> Tensor:
        points_x, points_y = x[..., :-n_classes], y[..., :-n_classes]
        geometric = options.cost(points_x, points_y) if options.cost else euclidean_cost(points_x, points_y, options.p)
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
    """Where geomloss's annealing starts, ``(B,)``: the largest distance, unless the blur is larger."""
    return (problem.cost.detach().amax((-2, -1)).clamp(min=0) ** (1 / problem.options.p)).maximum(problem.blur)


def _temperatures(problem: Problem) -> int:
    """Length of geomloss's annealing schedule, one iteration each."""
    ratio = float((_diameters(problem) / problem.blur).max())
    return 2 + math.ceil(math.log(ratio) / -math.log(SCALING))


def _marginal_error(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """L1 distance ``(B,)`` between the marginals of the plan and those it should have, as a share of the mass."""
    a, b, rho = problem.x.weights, problem.y.weights, problem.options.rho
    exponent = (f[:, :, None] + g[:, None, :] - problem.cost) / problem.eps[:, None, None]
    plan = a[:, :, None] * b[:, None, :] * exponent.exp()
    rows, columns = a * density(f, rho), b * density(g, rho)
    row_error = (plan.sum(-1) - rows).abs().sum(-1) / rows.sum(-1)
    column_error = (plan.sum(-2) - columns).abs().sum(-1) / columns.sum(-1)
    return row_error.maximum(column_error)

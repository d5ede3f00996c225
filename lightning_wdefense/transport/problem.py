"""One transport problem: what the arguments mean, and its optimal value with its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.costs import checked_cost, ground_cost, label_disagreement, mean_cost
from lightning_wdefense.transport.envelope import with_gradients
from lightning_wdefense.transport.measures import Measure, read_measures
from lightning_wdefense.transport.options import SinkhornOptions
from lightning_wdefense.transport.solver import (
    Potentials,
    density,
    price,
    semi_dual,
    solve,
    solve_symmetric,
    transport_plan,
)


class Problem(NamedTuple):
    """Two measures, the cost ``(B, N, M)`` between their points and the blur ``(B,)`` at which to transport."""

    x: Measure
    y: Measure
    cost: Tensor
    blur: Tensor
    options: SinkhornOptions

    @property
    def eps(self) -> Tensor:
        """Temperature ``(B,)``, in units of the cost."""
        return self.blur**self.options.p


def read_problem(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    options: SinkhornOptions,
) -> Problem:
    """Check the arguments; derive the cost and the blur."""
    if options.label_cost is not None and (x_labels is None or y_labels is None):
        missing = " and ".join(
            name for name, given in (("x_labels", x_labels), ("y_labels", y_labels)) if given is None
        )
        raise ValueError(f"label_cost={options.label_cost} needs labels: pass {missing}, or label_cost=None.")
    source, target = read_measures(x, y, a, b, x_labels, y_labels, balanced=options.rho is None)
    if options.cost is not None:
        options = replace(options, cost=checked_cost(options.cost, batched=x.ndim == 3))
    geometric = ground_cost(source, target, options.p, options.cost)
    blur = _blur(mean_cost(geometric, source, target), options)
    return Problem(source, target, add_label_cost(geometric, source, target, options), blur, options)


def add_label_cost(cost: Tensor, x: Measure, y: Measure, options: SinkhornOptions) -> Tensor:
    """The cost with the price of changing the label added, if there is one."""
    if options.label_cost is None or x.labels is None or y.labels is None:
        return cost
    return cost + options.label_cost * label_disagreement(x.labels, y.labels, cost.dtype)


def cross_transport(problem: Problem) -> tuple[Tensor, Potentials]:
    """Optimal value ``(B,)``, differentiable, and potentials of the transport of ``x`` to ``y``."""
    return _transport(problem.x, problem.y, problem.cost, problem, symmetric=False)


def self_transport(measure: Measure, problem: Problem) -> tuple[Tensor, Potentials]:
    """The same for the transport of a measure to itself, at the problem's blur."""
    options = problem.options
    cost = ground_cost(measure, measure, options.p, options.cost, same=True)
    return _transport(measure, measure, add_label_cost(cost, measure, measure, options), problem, symmetric=True)


def _transport(x: Measure, y: Measure, cost: Tensor, problem: Problem, symmetric: bool) -> tuple[Tensor, Potentials]:
    options, eps, rho = problem.options, problem.eps, problem.options.rho
    inputs = cost, x.weights, y.weights
    with torch.no_grad():
        fixed_cost, a, b = (tensor.detach() for tensor in inputs)
        if symmetric:
            potentials = solve_symmetric(fixed_cost, a, eps, rho, tol=options.tol, max_iter=options.max_iter)
        else:
            potentials = solve(fixed_cost, a, b, eps, rho, tol=options.tol, max_iter=options.max_iter)
        value = semi_dual(potentials.f, potentials.g, a, b, eps, rho)
        if not any(tensor.requires_grad for tensor in inputs):
            return value, potentials
        plan = transport_plan(potentials, fixed_cost, a, b, eps, rho) if cost.requires_grad else None
        grad_a, grad_b = (
            price(potential, rho) - eps[:, None] * (density(potential, rho) - others.sum(-1, keepdim=True))
            for potential, others in ((potentials.f, b), (potentials.g, a))
        )
    return with_gradients(value, inputs, (plan, grad_a, grad_b)), potentials


def _blur(mean: Tensor, options: SinkhornOptions) -> Tensor:
    """Blur ``(B,)``, kept away from temperatures that underflow: identical points have no typical distance."""
    floor = torch.finfo(mean.dtype).tiny ** (0.5 / options.p)
    if options.blur is not None:
        return torch.full_like(mean, options.blur).clamp(min=floor)
    if bool((mean < 0).any()):
        raise ValueError(
            f"cost is {float(mean.min()):.3g} on average, and a blur relative to a negative cost means nothing: "
            "pass blur=, or add a constant to the cost."
        )
    return (options.relative_blur * mean ** (1 / options.p)).clamp(min=floor)

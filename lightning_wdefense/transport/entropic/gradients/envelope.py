"""The value with its gradients by the envelope theorem, without a graph through the iterations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.gradients.second_order import (
    WEIGHT,
    euclidean_cost,
    gradients_of_weights_and_costs,
)
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Pair
from lightning_wdefense.transport.entropic.problem.costs import label_disagreement
from lightning_wdefense.transport.entropic.solver.optimum import Optimum, Transports

Gradients = Sequence[Tensor | None]


def differentiable_value(arguments: Arguments, transports: Transports) -> Tensor:
    """The sum ``(B,)`` of the transports, weighted by :data:`WEIGHT`, as a function of the inputs.

    The gradients that the transports hold are used up.
    """
    optima = transports.optima
    value = optima["xy"].value
    for pair, each in optima.items():
        if pair != "xy":
            value = value.add(each.value, alpha=WEIGHT[pair])
    if not any(arguments.needed):
        return value
    unused: dict[str, Any] = dict.fromkeys(("of_x", "of_y", "of_a", "of_b", "of_cost"))
    solutions = {pair: each._replace(**unused) for pair, each in optima.items()}
    eps = transports.blur**arguments.options.p
    return with_gradients(
        value,
        arguments.inputs,
        _first(arguments, optima),
        lambda *inputs: _differentiable(arguments, inputs, solutions, eps),
    )


def with_gradients(
    value: Tensor,
    inputs: Sequence[Tensor],
    gradients: Gradients,
    differentiable: Callable[..., Gradients] | None = None,
) -> Tensor:
    """``value`` ``(B,)`` as a function of ``inputs`` ``(B, ...)``, whose gradients are given.

    Args:
        value: the value of each problem.
        inputs: what it depends on.
        gradients: its gradients, ``None`` for an input that needs none.
        differentiable: computes the gradients from the inputs once more, in a way that can be differentiated; only called
            for a backward pass with ``create_graph=True``.
    """
    return _Envelope.apply(value, differentiable, len(inputs), *inputs, *gradients)


class _Envelope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, differentiable: Callable[..., Gradients] | None, n: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.n, ctx.differentiable = n, differentiable
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        if torch.is_grad_enabled():
            if ctx.differentiable is None:
                raise RuntimeError(
                    "This solver has no second derivatives, so it cannot be differentiated with create_graph=True: the "
                    'fixed plan would silently count as a constant. Use solver="native".'
                )
            gradients = ctx.differentiable(*inputs)
        scaled = (
            None if gradient is None else gradient * grad.view(-1, *(1,) * (gradient.ndim - 1))
            for gradient in gradients
        )
        return None, None, None, *scaled, *(None,) * ctx.n


def _first(arguments: Arguments, optima: Mapping[Pair, Optimum]) -> list[Tensor | None]:
    xy, within_x, within_y = optima["xy"], optima.get("xx"), optima.get("yy")
    of_x, of_y, of_a, of_b = xy.of_x, xy.of_y, xy.of_a, xy.of_b
    if within_x is not None and within_y is not None:
        pairs = (of_x, within_x.of_x), (of_y, within_y.of_x), (of_a, within_x.of_a), (of_b, within_y.of_a)
        of_x, of_y, of_a, of_b = (one if one is None or other is None else one.sub_(other) for one, other in pairs)
    if arguments.matrices:
        plans = [None if each.of_cost is None else WEIGHT[pair] * each.of_cost for pair, each in optima.items()]
        return [*plans, of_a, of_b]
    return [of_x, of_y, of_a, of_b]


def _differentiable(
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

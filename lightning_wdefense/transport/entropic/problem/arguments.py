"""The arguments of the Sinkhorn functions: as they were passed, and as they were read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.clouds.measures import Measure, read_measures
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.entropic.problem.costs import checked_cost

Pair = Literal["xy", "xx", "yy"]
"""Which two measures mass is transported between."""


class Given(NamedTuple):
    """The arguments as they were passed; ``debias`` asks for the transports of both measures to themselves too."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    x_labels: Tensor | None
    y_labels: Tensor | None
    options: SinkhornOptions
    debias: bool


class Needed(NamedTuple):
    """Which gradients may be asked for: in the points, in the weights, in the caller's own costs."""

    x: bool
    y: bool
    a: bool
    b: bool
    cost: bool

    def of(self, pair: Pair) -> Needed:
        """Those to which the transport between two of the measures contributes."""
        if pair == "xy":
            return self
        points, weights = (self.x, self.a) if pair == "xx" else (self.y, self.b)
        return Needed(points, points, weights, weights, self.cost)


class Arguments(NamedTuple):
    """The arguments, read once.

    Attributes:
        x: the first measure, batched, with its graph.
        y: the second measure.
        options: the settings.
        matrices: the caller's own costs ``(B, N, M)`` with their graphs, by pair; empty without a cost function of the caller's.
        pairs: the transports that are to be solved.
        needed: the gradients that may be asked for.
        weighted: whether weights were passed; without them they are uniform and their sum is one.
    """

    x: Measure
    y: Measure
    options: SinkhornOptions
    matrices: Mapping[Pair, Tensor]
    pairs: tuple[Pair, ...]
    needed: Needed
    weighted: bool

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the value depends on: points or the caller's costs, then weights."""
        points = tuple(self.matrices.values()) or (self.x.points, self.y.points)
        return *points, self.x.weights, self.y.weights

    def detached(self) -> Arguments:
        """The same without graphs."""
        matrices = {pair: matrix.detach() for pair, matrix in self.matrices.items()}
        return self._replace(x=self.x.detached(), y=self.y.detached(), matrices=matrices)


def read_arguments(given: Given, claims: list[Tensor] | None = None) -> Arguments:
    """Check the arguments; ``claims`` is as for :func:`~lightning_wdefense.transport.clouds.measures.read_measures`."""
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
    needed = _needed(source, target, matrices)
    return Arguments(source, target, options, matrices, pairs, needed, weighted=a is not None or b is not None)


def _needed(x: Measure, y: Measure, matrices: Mapping[Pair, Tensor]) -> Needed:
    def differentiable(*tensors: Tensor) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    a, b = differentiable(x.weights), differentiable(y.weights)
    if matrices:
        return Needed(False, False, a, b, cost=differentiable(*matrices.values()))
    return Needed(differentiable(x.points), differentiable(y.points), a, b, cost=False)

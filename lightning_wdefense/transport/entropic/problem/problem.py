"""One transport problem, or a batch that is solved at once: measures, ground costs and blur."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Pair
from lightning_wdefense.transport.entropic.problem.costs import (
    GroundCost,
    distance,
    half_squared_distance,
    half_squares,
    matrix_cost,
    with_labels,
    within_a_cloud,
)
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.sharing import Share, current_share

LOOPED = 2**18
"""Number of entries of a cost matrix from which a CPU solves the problems of a batch one by one, each in its cache."""


@dataclass(frozen=True)
class Problem:
    """Constants for autograd: points ``(N, D)`` and ``(M, D)``, or ``(B, N, D)`` and ``(B, M, D)``.

    Attributes:
        x: the one measure.
        y: the other one.
        options: the settings.
        matrices: the caller's own costs between the measures, without the price of labels.
        work: where costs are kept, of one pair at a time: first ``"xy"``, then the others.
        share: whose rows of the costs are where; ``None`` if all are here.
    """

    x: Measure
    y: Measure
    options: SinkhornOptions
    matrices: Mapping[Pair, Tensor]
    work: Workspace
    share: Share | None = field(default=None, kw_only=True)

    def measures(self, pair: Pair) -> tuple[Measure, Measure]:
        """The two measures that a pair names."""
        return (self.y if pair == "yy" else self.x), (self.x if pair == "xx" else self.y)

    def ground_cost(self, pair: Pair) -> GroundCost:
        """The cost between two measures, with the price of labels: the rows that are held here."""
        cost, label_cost = self._between if pair == "xy" else self._geometric(pair), self.options.label_cost
        if label_cost is None:
            return cost
        x, y = self.measures(pair)
        return with_labels(cost, self._held(x), y, label_cost).stored(self.x.weights, self.work, "labelled cost")

    def transposed_cost(self) -> GroundCost:
        """The cost ``(M_r, N)`` from the points of the second measure that are held here to all of the first."""
        return replace(self, x=self.y, y=self.x).ground_cost("xy")

    @cached_property
    def blur(self) -> Tensor:
        """Blur ``(...)``, in units of the distance."""
        mean = self._mean
        if self.options.blur is None and self.matrices and bool((mean < 0).any()):
            raise ValueError(
                f"cost is {float(mean.min()):.3g} on average, so a blur relative to it is not defined: "
                "pass blur=, or add a constant to the cost."
            )
        return blur_of(mean, self.options)

    @cached_property
    def eps(self) -> float | Tensor:
        """Temperature, in units of the cost: a number, or ``(B, 1)`` for a batch."""
        return _per_problem(self.blur**self.options.p)

    @cached_property
    def mean(self) -> float | Tensor:
        """Upper estimate of the mean cost between the measures, of the form of :attr:`eps`."""
        return _per_problem(self._mean + (self.options.label_cost or 0.0))

    @cached_property
    def _mean(self) -> Tensor:
        """Mean cost ``(...)`` between the measures, without the price of labels."""
        if self.matrices or self.options.p == 1:
            return self._between.average(self.x.weights, self.y.weights)
        product = (self.x.mean() * self.y.mean()).sum((-2, -1))
        return (_mean_half_square(self.x) + _mean_half_square(self.y) - product).clamp(min=0)

    @cached_property
    def _between(self) -> GroundCost:
        return self._geometric("xy")

    def _geometric(self, pair: Pair) -> GroundCost:
        if self.matrices:
            return matrix_cost(self.matrices[pair])
        x, y = self.measures(pair)
        x = self._held(x)
        if self.options.p == 1:
            cost = distance(x.points, y.points)
        else:
            cost = half_squared_distance(x, y, self.eps if isinstance(self.eps, float) else float(self.eps.min()))
        if pair == "xy":
            return cost.stored(x.weights, self.work, "cost")
        # Within a cloud the kernel is made but once, except that the gradient of a distance asks for it again.
        cost = within_a_cloud(cost, 0 if self.share is None else self.share.own.start)
        return cost.stored(x.weights, self.work, "cost") if self.options.p == 1 else cost

    def _held(self, measure: Measure) -> Measure:
        return measure if self.share is None else measure.rows(self.share.own)


def blur_of(mean: Tensor, options: SinkhornOptions) -> Tensor:
    """The blur ``(...)`` that follows from the mean cost.

    It is at least so large that the temperature does not underflow: identical points have no typical distance.
    """
    floor = torch.finfo(mean.dtype).tiny ** (0.5 / options.p)
    if options.blur is not None:
        return torch.full_like(mean, max(options.blur, floor))
    return (options.relative_blur * mean ** (1 / options.p)).clamp(min=floor)


def problems(arguments: Arguments, work: Workspace) -> Iterator[Problem]:
    """The batch ``(B, N, D)`` of problems, or each problem of it by itself, without a graph and around a common centre."""
    x, y, options, matrices, *_ = arguments.detached()
    centre = 0.5 * (x.mean() + y.mean())
    x, y = (measure._replace(points=measure.points - centre) for measure in (x, y))
    (size, n), m = x.weights.shape, y.weights.shape[1]
    if size > 1 and (n * m < LOOPED or x.points.is_cuda):
        yield Problem(x, y, options, matrices, work)
    else:
        for i in range(size):
            own = {pair: each[i] for pair, each in matrices.items()}
            yield Problem(x.problem(i), y.problem(i), options, own, work, share=shared(arguments))


def shared(arguments: Arguments) -> Share | None:
    """How the rows of a problem are shared among ranks: for one problem of half squared distances, where sharing pays."""
    (size, n), m = arguments.x.weights.shape, arguments.y.weights.shape[1]
    return current_share(n, m) if size == 1 and arguments.options.p == 2 and not arguments.matrices else None


def _mean_half_square(measure: Measure) -> Tensor:
    return (measure.weights * half_squares(measure.points)).sum(-1) / measure.weights.sum(-1)


def _per_problem(values: Tensor) -> float | Tensor:
    return float(values) if values.ndim == 0 else values.unsqueeze(-1)

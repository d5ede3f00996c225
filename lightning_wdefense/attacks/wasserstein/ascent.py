"""Gradient ascent of a loss over transport plans: projected ascent and Frank-Wolfe."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.cost_reduction import Potentials, cheaper_plan
from lightning_wdefense.attacks.wasserstein.linear_oracle import best_plan
from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport
from lightning_wdefense.attacks.wasserstein.projection import (
    Multipliers,
    fit_budget,
    fit_capacity,
    nearest_plan_with_capacity,
)

Method = Literal["projected", "frank-wolfe"]
AscentT = TypeVar("AscentT", bound="Ascent")
FIRST_STEP = 2.0
"""First step size of projected ascent: change for the largest entry of the gradient, in units of the image's largest pixel."""
CHECKPOINTS = 5
"""Number of checkpoints in a run, at which the step size may be halved."""
MIN_RISING_SHARE = 0.75
"""Smallest share of steps since the last checkpoint with a rise of the loss; below it the step size is halved."""
FIRST_PRICE_STEP = 0.3
"""First step size of the multipliers of the capacities in Frank-Wolfe, in units of the largest gradient entry."""
REPAIR_SWEEPS, REPAIR_TOLERANCE = 100, 1e-6
"""Largest number of sweeps, and tolerance in units of the images, of the repair in each step."""
REPLAN_ITERATIONS = 5
"""Number of iterations of the cost reduction in each step."""
MAX_BUDGET_FACTOR, BUDGET_FACTOR_POWER = 3.0, 0.3
"""Largest budget of a step as a multiple of the budget, and the exponent with which that multiple follows ``budget / cost``."""


@dataclass
class Ascent(ABC):
    """A transport plan that follows the gradient of a loss.

    The transport cost of an image is the cost of its cheapest plan. Steps produce plans that cost more, because mass
    moves back and forth. So after each step the plan is replaced by a cheaper plan of nearly the same image. The next
    step may then use more than the budget, by as much as the replacement saves.

    Attributes:
        transport: the constraints.
        feasible: a feasible plan near the current plan, ``(N, K, R)``; the model gets the images of this plan.
        steps: number of steps of the run.
        taken: number of steps so far.
        budget_factor: budget of a step as a multiple of the budget, ``(N,)``.
        potentials: dual potentials of the cheapest plan.
    """

    transport: LocalTransport
    feasible: Tensor
    steps: int
    taken: int = 0
    budget_factor: Tensor = field(init=False)
    potentials: Potentials = field(init=False)

    def __post_init__(self) -> None:
        self.budget_factor = torch.ones_like(self.transport.budget)
        self.potentials = Potentials.zeros(self.transport)

    @abstractmethod
    def move(self, gradient: Tensor, values: Tensor) -> None:
        """Take one step.

        Args:
            gradient: gradient of the loss at the images of the feasible plan, ``(N, C, H, W)``.
            values: loss at these images, ``(N,)``.
        """

    def select(self: AscentT, index: Tensor) -> AscentT:
        """The same for some of the images."""
        part = replace(self, transport=self.transport.select(index), feasible=self.feasible[index])
        for each in fields(self):
            if not each.init:  # state that the ascent keeps for each image
                value = getattr(self, each.name)
                setattr(part, each.name, value[index] if isinstance(value, Tensor) else value.select(index))
        return part

    @property
    def enlarged_transport(self) -> LocalTransport:
        """The constraints with the budget of a step."""
        return replace(self.transport, budget=self.transport.budget * self.budget_factor)

    def replan(self, plan: Tensor) -> Tensor:
        """Replace a plan ``(N, K, R)`` by a cheaper one, which is returned, and update the feasible plan."""
        plan, self.potentials = cheaper_plan(self.transport, plan, self.potentials, iterations=REPLAN_ITERATIONS)
        fits = fit_capacity(self.transport, plan, sweeps=REPAIR_SWEEPS, tol=REPAIR_TOLERANCE)
        budget, cost = self.transport.budget, self.transport.cost(fits)
        left = budget / cost.clamp_min(torch.finfo(cost.dtype).tiny)
        self.budget_factor = (self.budget_factor * left**BUDGET_FACTOR_POWER).clamp(1, MAX_BUDGET_FACTOR)
        self.feasible = fit_budget(self.transport, fits)
        return plan


@dataclass
class ProjectedAscent(Ascent):
    """Gradient steps and projections of the plan, with a step size for each image.

    The step size follows Auto-PGD (Croce and Hein, 2020). If the loss rose on less than three quarters of the steps
    since the last checkpoint, the step size is halved and the ascent continues from the best plan so far.
    """

    prices: Multipliers = field(init=False)
    step: Tensor = field(init=False)
    rises: Tensor = field(init=False)
    best: Tensor = field(init=False)
    best_plan: Tensor = field(init=False)
    best_gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.transport.budget
        self.prices = Multipliers.zeros(self.transport)
        self.step = FIRST_STEP * self.transport.masses.amax(1)
        self.rises = torch.zeros_like(budget)
        self.best = torch.full_like(budget, -torch.inf)
        self.best_plan = self.feasible
        self.best_gradient = budget.new_zeros(self.transport.shape)

    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step."""
        rose = values > self.best
        self.rises += rose
        self.best = torch.where(rose, values, self.best)
        self.best_plan = torch.where(rose.view(-1, 1, 1), self.feasible, self.best_plan)
        self.best_gradient = torch.where(rose.view(-1, 1, 1, 1), gradient, self.best_gradient)
        plan, every = self.feasible, max(self.steps // CHECKPOINTS, 2)
        self.taken += 1
        if self.taken % every == 0:
            stuck = self.rises < MIN_RISING_SHARE * every
            self.step = torch.where(stuck, self.step / 2, self.step)
            plan = torch.where(stuck.view(-1, 1, 1), self.best_plan, plan)
            gradient = torch.where(stuck.view(-1, 1, 1, 1), self.best_gradient, gradient)
            self.rises = torch.zeros_like(self.rises)
        climb = self.transport.gather_neighbours(steepest(gradient) * self.step.view(-1, 1, 1, 1))
        plan, self.prices = nearest_plan_with_capacity(self.enlarged_transport, plan + climb, self.prices)
        self.replan(plan)


@dataclass
class FrankWolfe(Ascent):
    """The Frank-Wolfe method: averages of exact solutions of the linearised problem in the ball, without the capacities.

    The capacities enter through multipliers. They rise for pixels of the average image that exceed their capacity, and
    fall for pixels below it.
    """

    plan: Tensor = field(init=False)
    prices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plan = self.feasible
        self.prices = self.feasible.new_zeros(self.transport.shape)

    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step."""
        vertex = best_plan(self.enlarged_transport, steepest(gradient) - self.prices)
        self.plan = torch.lerp(self.plan, vertex, 2 / (self.taken + 2))
        self.taken += 1
        if self.transport.capacity is not None:
            images = self.transport.transported(self.plan)
            over = (images - self.transport.capacity.view_as(images)).clamp(-1, 1)
            self.prices = (self.prices + FIRST_PRICE_STEP / math.sqrt(self.taken) * over).clamp_min(0)
        self.replan(self.plan)


ASCENTS: dict[str, type[Ascent]] = {
    "projected": ProjectedAscent,
    "frank-wolfe": FrankWolfe,
}


def steepest(gradient: Tensor) -> Tensor:
    """The gradient ``(N, C, H, W)``, scaled so that the largest absolute entry of each image is 1."""
    largest = gradient.abs().flatten(1).amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / largest.view(-1, 1, 1, 1)

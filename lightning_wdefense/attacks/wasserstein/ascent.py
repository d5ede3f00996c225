"""Ascent of a loss over transport plans: the ways to move a plan by a gradient."""

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
"""Of projected ascent: what the largest entry of the gradient moves, in units of the image's largest pixel."""
CHECKPOINTS = 5
"""How often in a run steps may be halved."""
MIN_RISING_SHARE = 0.75
"""Share of steps on which the loss must have risen since the last look, for the step to stay as it is."""
FIRST_PRICE_STEP = 0.3
"""By how much the prices of overfull pixels rise in the first step of Frank-Wolfe, in units of the largest gradient."""
REPAIR_SWEEPS, REPAIR_TOLERANCE = 100, 1e-6
"""Of the repair in every step."""
REPLAN_ITERATIONS = 5
"""Steps towards the cheapest plan, in every step of the ascent."""
MAX_BUDGET_FACTOR, BUDGET_FACTOR_POWER = 3.0, 0.3
"""The most that a step may spend, in budgets, and how fast it comes to what is right: a power of what the last plan left of the budget."""


@dataclass
class Ascent(ABC):
    """A plan that moves with the loss.

    What an image costs is what the cheapest of its plans does, and steps leave plans that are dearer: mass goes there and back. So after every
    step the plan makes way for a cheaper one of the same image, and the next step may spend more than the budget, by as much as that saves.

    Attributes:
        transport: the constraints.
        legal: the legal plan near to it, whose images the model is shown.
        steps: that it will take.
        taken: of them, so far.
        stretch: what a step may spend, in budgets, ``(N,)``.
        potentials: of the cheapest plan.
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
        """One step; the gradient ``(N, C, H, W)`` and the loss ``(N,)`` are those of the legal plan's images."""

    def select(self: AscentT, index: Tensor) -> AscentT:
        """The same for some of the images."""
        part = replace(self, transport=self.transport.select(index), feasible=self.feasible[index])
        for each in fields(self):
            if not each.init:  # what the ascent itself keeps of every image
                value = getattr(self, each.name)
                setattr(part, each.name, value[index] if isinstance(value, Tensor) else value.select(index))
        return part

    @property
    def with_enlarged_budget(self) -> LocalTransport:
        """The constraints, with what a step may spend for a budget."""
        return replace(self.transport, budget=self.transport.budget * self.budget_factor)

    def replan(self, plan: Tensor) -> Tensor:
        """Let a plan ``(N, K, R)`` make way for a cheaper one, which is returned, and that for a legal one."""
        plan, self.potentials = cheaper_plan(self.transport, plan, self.potentials, iterations=REPLAN_ITERATIONS)
        fits = fit_capacity(self.transport, plan, sweeps=REPAIR_SWEEPS, tol=REPAIR_TOLERANCE)
        budget, cost = self.transport.budget, self.transport.cost(fits)
        left = budget / cost.clamp_min(torch.finfo(cost.dtype).tiny)
        self.budget_factor = (self.budget_factor * left**BUDGET_FACTOR_POWER).clamp(1, MAX_BUDGET_FACTOR)
        self.feasible = fit_budget(self.transport, fits)
        return plan


@dataclass
class ProjectedAscent(Ascent):
    """Steps along the gradient and back to the nearest plan; a step size for each image, halved where the loss no longer rises.

    The rule is that of Auto-PGD (Croce and Hein, 2020): at every look, where the loss rose on less than three quarters of the steps, the step
    is halved and the ascent goes on from the best plan so far.
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
        plan, self.prices = nearest_plan_with_capacity(self.with_enlarged_budget, plan + climb, self.prices)
        self.replan(plan)


@dataclass
class FrankWolfe(Ascent):
    """Averages of the best plans for the gradients on the way, which are exact solutions of the linear problem in the ball without the box.

    Of the box they know through prices, which rise where pixels of the average overflow and fall where there is room.
    """

    plan: Tensor = field(init=False)
    prices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plan = self.feasible
        self.prices = self.feasible.new_zeros(self.transport.shape)

    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step."""
        vertex = best_plan(self.with_enlarged_budget, steepest(gradient) - self.prices)
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
    """Each image's gradient, its largest entry 1."""
    largest = gradient.abs().flatten(1).amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / largest.view(-1, 1, 1, 1)

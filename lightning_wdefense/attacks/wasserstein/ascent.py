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
from lightning_wdefense.attacks.wasserstein.projection import Prices, affordable, fitting, nearest_plan_with_room

Method = Literal["projected", "frank-wolfe"]
AscentT = TypeVar("AscentT", bound="Ascent")
FIRST_STEP = 2.0
"""Of projected ascent: what the largest entry of the gradient moves, in units of the image's largest pixel."""
LOOKS = 5
"""How often in a run steps may be halved."""
RISING = 0.75
"""Share of steps on which the loss must have risen since the last look, for the step to stay as it is."""
PRESSURE = 0.3
"""By how much the prices of overfull pixels rise in the first step of Frank-Wolfe, in units of the largest gradient."""
SWEEPS, TOLERANCE = 100, 1e-6
"""Of the repair in every step."""
REPLANNING = 5
"""Steps towards the cheapest plan, in every step of the ascent."""
STRETCH, PULL = 3.0, 0.3
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
    legal: Tensor
    steps: int
    taken: int = 0
    stretch: Tensor = field(init=False)
    potentials: Potentials = field(init=False)

    def __post_init__(self) -> None:
        self.stretch = torch.ones_like(self.transport.budget)
        self.potentials = Potentials.none(self.transport)

    @abstractmethod
    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step; the gradient ``(N, C, H, W)`` and the loss ``(N,)`` are those of the legal plan's images."""

    def select(self: AscentT, index: Tensor) -> AscentT:
        """The same for some of the images."""
        part = replace(self, transport=self.transport.select(index), legal=self.legal[index])
        for each in fields(self):
            if not each.init:  # what the ascent itself keeps of every image
                value = getattr(self, each.name)
                setattr(part, each.name, value[index] if isinstance(value, Tensor) else value.select(index))
        return part

    @property
    def stretched(self) -> LocalTransport:
        """The constraints, with what a step may spend for a budget."""
        return replace(self.transport, budget=self.transport.budget * self.stretch)

    def settle(self, plan: Tensor) -> Tensor:
        """Let a plan ``(N, K, R)`` make way for a cheaper one, which is returned, and that for a legal one."""
        plan, self.potentials = cheaper_plan(self.transport, plan, self.potentials, iterations=REPLANNING)
        fits = fitting(self.transport, plan, sweeps=SWEEPS, tol=TOLERANCE)
        budget, cost = self.transport.budget, self.transport.cost(fits)
        left = budget / cost.clamp_min(torch.finfo(cost.dtype).tiny)
        self.stretch = (self.stretch * left**PULL).clamp(1, STRETCH)
        self.legal = affordable(self.transport, fits)
        return plan


@dataclass
class ProjectedAscent(Ascent):
    """Steps along the gradient and back to the nearest plan; a step size for each image, halved where the loss no longer rises.

    The rule is that of Auto-PGD (Croce and Hein, 2020): at every look, where the loss rose on less than three quarters of the steps, the step
    is halved and the ascent goes on from the best plan so far.
    """

    prices: Prices = field(init=False)
    step: Tensor = field(init=False)
    rises: Tensor = field(init=False)
    best: Tensor = field(init=False)
    best_plan: Tensor = field(init=False)
    best_gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.transport.budget
        self.prices = Prices.none(self.transport)
        self.step = FIRST_STEP * self.transport.masses.amax(1)
        self.rises = torch.zeros_like(budget)
        self.best = torch.full_like(budget, -torch.inf)
        self.best_plan = self.legal
        self.best_gradient = budget.new_zeros(self.transport.shape)

    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step."""
        rose = values > self.best
        self.rises += rose
        self.best = torch.where(rose, values, self.best)
        self.best_plan = torch.where(rose.view(-1, 1, 1), self.legal, self.best_plan)
        self.best_gradient = torch.where(rose.view(-1, 1, 1, 1), gradient, self.best_gradient)
        plan, every = self.legal, max(self.steps // LOOKS, 2)
        self.taken += 1
        if self.taken % every == 0:
            stuck = self.rises < RISING * every
            self.step = torch.where(stuck, self.step / 2, self.step)
            plan = torch.where(stuck.view(-1, 1, 1), self.best_plan, plan)
            gradient = torch.where(stuck.view(-1, 1, 1, 1), self.best_gradient, gradient)
            self.rises = torch.zeros_like(self.rises)
        climb = self.transport.seen_from(steepest(gradient) * self.step.view(-1, 1, 1, 1))
        plan, self.prices = nearest_plan_with_room(self.stretched, plan + climb, self.prices)
        self.settle(plan)


@dataclass
class FrankWolfe(Ascent):
    """Averages of the best plans for the gradients on the way, which are exact solutions of the linear problem in the ball without the box.

    Of the box they know through prices, which rise where pixels of the average overflow and fall where there is room.
    """

    plan: Tensor = field(init=False)
    prices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plan = self.legal
        self.prices = self.legal.new_zeros(self.transport.shape)

    def move(self, gradient: Tensor, values: Tensor) -> None:
        """One step."""
        vertex = best_plan(self.stretched, steepest(gradient) - self.prices)
        self.plan = torch.lerp(self.plan, vertex, 2 / (self.taken + 2))
        self.taken += 1
        if self.transport.room is not None:
            images = self.transport.arrived(self.plan)
            over = (images - self.transport.room.view_as(images)).clamp(-1, 1)
            self.prices = (self.prices + PRESSURE / math.sqrt(self.taken) * over).clamp_min(0)
        self.settle(self.plan)


ASCENTS: dict[str, type[Ascent]] = {
    "projected": ProjectedAscent,
    "frank-wolfe": FrankWolfe,
}


def steepest(gradient: Tensor) -> Tensor:
    """Each image's gradient, its largest entry 1."""
    largest = gradient.abs().flatten(1).amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient / largest.view(-1, 1, 1, 1)

"""Wasserstein attacks as published: they know nothing of the bounds on pixels.

Written from the paper (Wu, Wang, Yu, "Stronger and faster Wasserstein adversarial attacks", ICML 2020), on the plans of the library, where
only what is published is used: cross-entropy, local plans of 5 x 5 pixels, one run from the clean image. Where the paper bisects for the
multiplier of its projection, ours is used, which returns the same point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_wdefense.attacks.wasserstein.ascent import steepest
from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport
from lightning_wdefense.attacks.wasserstein.projection import (
    Multipliers,
    feasible_plan,
    nearest_plan,
    nearest_plan_with_capacity,
)

ENTROPY = 1e-3
"""Of the smoothed linear oracle, for gradients whose largest entry is 1."""
BISECTIONS = 25
STEP_SIZES = (0.1, 1.0)
"""Of projected ascent; each image keeps the better one."""
REPAIRS = 60


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """That of the cross-entropy, its largest entry 1."""
    point = images.detach().requires_grad_()
    loss = nn.functional.cross_entropy(model(point), labels, reduction="sum")
    (found,) = torch.autograd.grad(loss, point)
    return steepest(found)


def frank_wolfe(model: nn.Module, labels: Tensor, transport: LocalTransport, steps: int) -> list[Tensor]:
    """Frank-Wolfe with the dual linear oracle: entropy in the rows, bisection for the multiplier, steps of 2 / (t + 2)."""
    plan = transport.identity_plan()
    for step in range(steps):
        direction = gradient(model, transport.transported(plan), labels)
        plan = torch.lerp(plan, smoothed_oracle(transport, direction), 2 / (step + 2))
    return [plan]


def smoothed_oracle(transport: LocalTransport, values: Tensor) -> Tensor:
    seen = transport.gather_neighbours(values).masked_fill(~transport.inside, -torch.inf)
    low = torch.zeros_like(transport.budget).view(-1, 1, 1)
    high = torch.full_like(low, 4.0)  # the largest difference of values is 2, for a distance of 1 at least
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = transport.masses.unsqueeze(1) * ((seen - middle * transport.costs) / ENTROPY).softmax(1)
        dear = (transport.cost(plan) > transport.budget).view(-1, 1, 1)
        low, high = torch.where(dear, middle, low), torch.where(dear, high, middle)
    return transport.masses.unsqueeze(1) * ((seen - high * transport.costs) / ENTROPY).softmax(1)


def dual_projection(model: nn.Module, labels: Tensor, transport: LocalTransport, steps: int) -> list[Tensor]:
    """Steps along the gradient and the exact projection of the plan, for every step size."""
    plans = []
    for size in STEP_SIZES:
        plan = transport.identity_plan()
        for _ in range(steps):
            direction = gradient(model, transport.transported(plan), labels)
            plan = nearest_plan(
                transport, plan + size * transport.gather_neighbours(direction), iterations=12, tol=1e-3
            )
        plans.append(plan)
    return plans


PEERS: dict[str, Callable[[nn.Module, Tensor, LocalTransport, int], list[Tensor]]] = {
    "Frank-Wolfe, published": frank_wolfe,
    "dual projection, published": dual_projection,
}


def repaired(transport: LocalTransport, plan: Tensor) -> list[Tensor]:
    """Legal images from any plan, in two ways: what does not fit stays at home, at once or after the projection onto plans that fit."""
    near, _ = nearest_plan_with_capacity(transport, plan, Multipliers.zeros(transport), iterations=REPAIRS)
    return [transport.transported(feasible_plan(transport, each)) for each in (plan, near)]


def without_room(transport: LocalTransport) -> LocalTransport:
    return replace(transport, capacity=None)

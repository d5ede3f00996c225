"""The projection onto the Wasserstein ball, by its dual; and the last step that makes a plan legal in all respects."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport

CAPACITY_STEP = 0.7
"""Of the prices of room, in Newton steps of each by itself: less than 1, as those of its neighbours move too."""


class Multipliers(NamedTuple):
    """Multipliers of the constraints, from which the next projection can start.

    Attributes:
        cost: of the budget, ``(N, 1, 1)``.
        room: of the room in each pixel, ``(N, C, H, W)``.
    """

    cost: Tensor
    capacity: Tensor

    @classmethod
    def zeros(cls, transport: LocalTransport) -> Multipliers:
        """Everything is free."""
        budget = transport.budget
        return cls(budget.new_zeros(len(budget), 1, 1), budget.new_zeros(transport.shape))

    def select(self, index: Tensor) -> Multipliers:
        """Those of some of the images."""
        return Multipliers(self.cost[index], self.capacity[index])


def nearest_plan(transport: LocalTransport, target: Tensor, *, iterations: int = 200, tol: float = 1e-7) -> Tensor:
    """The plan of the budget that is nearest to ``target`` ``(N, K, R)`` in the Euclidean sense, whatever the room.

    At each price of a unit of cost the rows are independent projections onto simplices. Newton's method finds the price at which the
    budget is spent, inside of a bracket that shrinks.

    Args:
        transport: the constraints.
        target: what to come near to.
        iterations: most of them.
        tol: of the cost, relative to the budget.
    """
    target, budget = target.masked_fill(~transport.inside, -torch.inf), transport.budget.view(-1, 1, 1)
    price = torch.zeros_like(budget)
    low, high = price, torch.full_like(budget, torch.inf)
    for _ in range(iterations):
        plan = _onto_rows(target - price * transport.costs, transport.masses)
        excess, slope = _excess(transport, plan)
        if bool(((excess.abs() <= tol * budget) | ((excess <= 0) & (price <= 0))).all()):
            break
        low, high = torch.where(excess > 0, price, low), torch.where(excess > 0, high, price)
        newton = price + excess / slope
        bracketed = (newton > low) & (newton < high)
        price = torch.where(bracketed, newton, torch.where(high.isinf(), 2 * low + 1, (low + high) / 2))
    return plan


def nearest_plan_with_capacity(
    transport: LocalTransport, target: Tensor, prices: Multipliers, *, iterations: int = 3
) -> tuple[Tensor, Multipliers]:
    """The same with regard to the room in the pixels, nearly: a few steps of the dual, from the prices of the last time.

    Every iteration moves the price of cost by Newton's method and the price of each pixel by its own curvature, all at once. The price of
    cost falls by half at most: where it is so high that nothing moves, it does not show by how much. :func:`feasible_plan` makes what is returned
    legal.

    Returns:
        The plan, and the prices.
    """
    target = target.masked_fill(~transport.inside, -torch.inf)
    price, capacity = prices
    low, high = (
        torch.zeros_like(price),
        _price_that_stops_all(transport, target - transport.gather_neighbours(capacity)),
    )
    for _ in range(iterations):
        plan = _onto_rows(target - price * transport.costs - transport.gather_neighbours(capacity), transport.masses)
        excess, slope = _excess(transport, plan)
        newton = torch.maximum(price + excess / slope, price / 2)
        # The prices of room move the root, so its bracket widens.
        low, high = torch.where(excess > 0, price, 0.9 * low), torch.where(excess > 0, high / 0.9, price)
        price = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        if transport.capacity is None:
            continue
        images, active = transport.transported(plan), plan.sign()
        curvature = transport.transported(active - active / active.sum(1, keepdim=True).clamp_min(1)).clamp_min(0.5)
        capacity = (capacity + CAPACITY_STEP * (images - transport.capacity.view_as(images)) / curvature).clamp_min(0)
    return plan, Multipliers(price, capacity)


def _price_that_stops_all(transport: LocalTransport, goal: Tensor) -> Tensor:
    """The price of cost from which on the nearest plan to ``goal`` moves nothing, ``(N, 1, 1)``."""
    centre = transport.neighbourhood.centre
    pull = goal - (goal[:, centre] - transport.masses).unsqueeze(1)
    pull[:, centre] = 0
    return (pull / transport.costs.clamp_min(1)).amax((1, 2)).clamp_min(0).view(-1, 1, 1)


def feasible_plan(transport: LocalTransport, plan: Tensor, *, sweeps: int = 500, tol: float = 1e-7) -> Tensor:
    """A plan that holds all constraints: :func:`fitting`, then :func:`affordable`."""
    return fit_budget(transport, fit_capacity(transport, plan, sweeps=sweeps, tol=tol))


def fit_capacity(transport: LocalTransport, plan: Tensor, *, sweeps: int = 500, tol: float = 1e-7) -> Tensor:
    """A plan that moves the mass there is and finds room for it, by leaving at home what does not fit.

    Of what comes to a pixel as large a share is let in as its room allows, once what others send back is at home again: the greatest such
    shares, which a falling sequence finds.

    Args:
        transport: the constraints.
        plan: any, ``(N, K, R)``.
        sweeps: most steps of that sequence.
        tol: by how much pixels may overflow after it.
    """
    plan = rescale_rows(transport, plan.clamp_min(0))
    plan[:, transport.neighbourhood.centre] = 0
    if transport.capacity is not None:
        coming = transport.transported(plan).flatten(1)
        spare = transport.capacity - torch.zeros_like(coming).scatter_(1, transport.rows, transport.masses)
        share, going = torch.ones_like(coming), plan
        for _ in range(sweeps):
            gone = torch.zeros_like(coming).scatter_(1, transport.rows, going.sum(1))
            fits = torch.where(coming > 0, ((spare + gone) / coming).clamp(0, 1), share)
            last, share = share, torch.minimum(share, fits)
            going = plan * transport.gather_neighbours(share.view(transport.shape))
            if not bool(((last - share) * coming > tol).any()):
                break
        plan = going
    return _keep_remainder(transport, plan)


def rescale_rows(transport: LocalTransport, plan: Tensor) -> Tensor:
    """A plan without negative entries, its rows scaled to the masses of the pixels."""
    return plan * (transport.masses.unsqueeze(1) / plan.sum(1, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny))


def fit_budget(transport: LocalTransport, plan: Tensor) -> Tensor:
    """All that moves, scaled to the budget."""
    cost = transport.cost(plan)
    share = (transport.budget / cost.clamp_min(torch.finfo(cost.dtype).tiny)).clamp(max=1)
    return _keep_remainder(transport, plan * share.view(-1, 1, 1))


def _keep_remainder(transport: LocalTransport, plan: Tensor) -> Tensor:
    """The plan, in place, with what its rows do not send in their own pixels."""
    centre = transport.neighbourhood.centre
    plan[:, centre] = 0
    plan[:, centre] = transport.masses - plan.sum(1)
    return plan


def _onto_rows(goal: Tensor, masses: Tensor) -> Tensor:
    """Each row ``(N, K, R)`` onto the simplex of its mass ``(N, R)``."""
    masses = masses.unsqueeze(1)
    # Left of the root of a convex, falling function Newton's steps rise to it and, as it has at most K pieces, end there.
    shift = goal.amax(1, keepdim=True) - masses
    for _ in range(goal.shape[1]):
        above = (goal - shift).clamp_min_(0)
        excess = (above.sum(1, keepdim=True) - masses).clamp_min_(0)
        before, shift = shift, shift + excess / above.sign_().sum(1, keepdim=True).clamp_min_(1)
        if torch.equal(before, shift):
            break
    return (goal - shift).clamp_min_(0)


def _excess(transport: LocalTransport, plan: Tensor) -> tuple[Tensor, Tensor]:
    """By how much a plan exceeds the budget, and how fast that falls with the price of cost, both ``(N, 1, 1)``."""
    active, costs = plan.sign(), transport.costs
    count = active.sum(1).clamp_min_(1)
    # An entry falls by its own cost less the mean of those in its row, which stays as large as it is.
    first, second = (active.mul_(costs).sum(1) for _ in range(2))
    slope = (second - first.square() / count).sum(1)
    excess = transport.cost(plan) - transport.budget
    return excess.view(-1, 1, 1), slope.clamp_min(torch.finfo(slope.dtype).eps).view(-1, 1, 1)

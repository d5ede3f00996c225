"""The projection of transport plans onto the Wasserstein ball, by its dual, and the repair that makes a plan feasible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport

CAPACITY_STEP = 0.7
"""Step size for the multipliers of the capacities, as a fraction of a Newton step for each multiplier by itself.

It is below 1 because the multipliers of neighbouring pixels change at the same time.
"""


class Multipliers(NamedTuple):
    """Lagrange multipliers (prices) of the constraints, from which the next projection can start.

    Attributes:
        cost: multiplier of the transport budget, ``(N, 1, 1)``.
        capacity: multipliers of the capacity of each pixel, ``(N, C, H, W)``.
    """

    cost: Tensor
    capacity: Tensor

    @classmethod
    def zeros(cls, transport: LocalTransport) -> Multipliers:
        """Multipliers of 0."""
        budget = transport.budget
        return cls(budget.new_zeros(len(budget), 1, 1), budget.new_zeros(transport.shape))

    def select(self, index: Tensor) -> Multipliers:
        """The multipliers of some of the images."""
        return Multipliers(self.cost[index], self.capacity[index])


def nearest_plan(transport: LocalTransport, target: Tensor, *, iterations: int = 200, tol: float = 1e-7) -> Tensor:
    """Project ``target`` onto the plans within the transport budget, in Euclidean distance; capacities are ignored.

    For a given multiplier of the cost, the rows of the plan are independent projections onto simplices. Newton's
    method, inside a bracket, finds the multiplier at which the budget is spent.

    Args:
        transport: the constraints.
        target: the point to project, ``(N, K, R)``.
        iterations: largest number of iterations.
        tol: tolerance of the cost, relative to the budget.

    Returns:
        The plan ``(N, K, R)``.
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
    """Project ``target`` approximately onto the plans within budget and capacities, by a few dual steps from given multipliers.

    Each iteration updates the multiplier of the cost by Newton's method and the multiplier of each pixel by a diagonal
    Newton step, all at once. The multiplier of the cost falls by at most half per iteration, because for a multiplier
    so large that no mass moves the Newton step is not defined. The result may violate the constraints slightly;
    :func:`feasible_plan` repairs it.

    Args:
        transport: the constraints.
        target: the point to project, ``(N, K, R)``.
        prices: multipliers to start from.
        iterations: number of iterations.

    Returns:
        The plan ``(N, K, R)``, and the multipliers.
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
        # The multipliers of the capacities move the root, so the bracket is widened.
        low, high = torch.where(excess > 0, price, 0.9 * low), torch.where(excess > 0, high / 0.9, price)
        price = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        if transport.capacity is None:
            continue
        images, active = transport.transported(plan), plan.sign()
        curvature = transport.transported(active - active / active.sum(1, keepdim=True).clamp_min(1)).clamp_min(0.5)
        capacity = (capacity + CAPACITY_STEP * (images - transport.capacity.view_as(images)) / curvature).clamp_min(0)
    return plan, Multipliers(price, capacity)


def _price_that_stops_all(transport: LocalTransport, goal: Tensor) -> Tensor:
    """The smallest multiplier of the cost at which the plan nearest to ``goal`` moves no mass, ``(N, 1, 1)``."""
    centre = transport.neighbourhood.centre
    pull = goal - (goal[:, centre] - transport.masses).unsqueeze(1)
    pull[:, centre] = 0
    return (pull / transport.costs.clamp_min(1)).amax((1, 2)).clamp_min(0).view(-1, 1, 1)


def feasible_plan(transport: LocalTransport, plan: Tensor, *, sweeps: int = 500, tol: float = 1e-7) -> Tensor:
    """A plan that satisfies all constraints: :func:`fit_capacity`, then :func:`fit_budget`."""
    return fit_budget(transport, fit_capacity(transport, plan, sweeps=sweeps, tol=tol))


def fit_capacity(transport: LocalTransport, plan: Tensor, *, sweeps: int = 500, tol: float = 1e-7) -> Tensor:
    """Scale a plan down so that no pixel exceeds its capacity; mass that does not fit stays in its own pixel.

    Each pixel accepts a share of the mass that arrives, as large as its capacity allows. Mass that is not accepted
    returns to its own pixel and uses capacity there. The largest shares that are consistent are the limit of a
    decreasing sequence.

    Args:
        transport: the constraints.
        plan: any plan, ``(N, K, R)``.
        sweeps: largest number of iterations of that sequence.
        tol: by how much a pixel may exceed its capacity, in units of the images.

    Returns:
        The plan ``(N, K, R)``.
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
    """A non-negative plan ``(N, K, R)`` with its rows scaled so that they sum to the masses of the pixels."""
    return plan * (transport.masses.unsqueeze(1) / plan.sum(1, keepdim=True).clamp_min(torch.finfo(plan.dtype).tiny))


def fit_budget(transport: LocalTransport, plan: Tensor) -> Tensor:
    """Scale the mass that moves down, so that the cost of the plan is within the budget."""
    cost = transport.cost(plan)
    share = (transport.budget / cost.clamp_min(torch.finfo(cost.dtype).tiny)).clamp(max=1)
    return _keep_remainder(transport, plan * share.view(-1, 1, 1))


def _keep_remainder(transport: LocalTransport, plan: Tensor) -> Tensor:
    """The plan, changed in place: mass that its rows do not move stays in its own pixel."""
    centre = transport.neighbourhood.centre
    plan[:, centre] = 0
    plan[:, centre] = transport.masses - plan.sum(1)
    return plan


def _onto_rows(goal: Tensor, masses: Tensor) -> Tensor:
    """Project each row of ``goal`` ``(N, K, R)`` onto the simplex of its mass ``(N, R)``."""
    masses = masses.unsqueeze(1)
    # The function is convex, decreasing and piecewise linear with at most K pieces, so Newton's method from the left of its root
    # increases monotonically and ends at the root after at most K steps.
    shift = goal.amax(1, keepdim=True) - masses
    for _ in range(goal.shape[1]):
        above = (goal - shift).clamp_min_(0)
        excess = (above.sum(1, keepdim=True) - masses).clamp_min_(0)
        before, shift = shift, shift + excess / above.sign_().sum(1, keepdim=True).clamp_min_(1)
        if torch.equal(before, shift):
            break
    return (goal - shift).clamp_min_(0)


def _excess(transport: LocalTransport, plan: Tensor) -> tuple[Tensor, Tensor]:
    """The cost of a plan minus the budget, and the negative derivative by the multiplier of the cost, both ``(N, 1, 1)``."""
    active, costs = plan.sign(), transport.costs
    count = active.sum(1).clamp_min_(1)
    # The derivative of an active entry is the mean cost of the active entries in its row minus its own, as the row sum is fixed.
    first, second = (active.mul_(costs).sum(1) for _ in range(2))
    slope = (second - first.square() / count).sum(1)
    excess = transport.cost(plan) - transport.budget
    return excess.view(-1, 1, 1), slope.clamp_min(torch.finfo(slope.dtype).eps).view(-1, 1, 1)

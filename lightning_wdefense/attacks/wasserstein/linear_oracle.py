"""The linear oracle of the Wasserstein ball, for the Frank-Wolfe method."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport


def best_plan(transport: LocalTransport, values: Tensor) -> Tensor:
    """The plan within the budget that maximises the total value of the transported mass: exact, without entropic regularisation.

    Capacities are ignored. The budget is the only constraint that couples the rows of this linear program. Of the
    neighbours of a pixel only those on the upper convex hull of the points (cost, value) matter. The budget is spent on
    the hull segments of largest slope first; the last one is used in part.

    Args:
        transport: the constraints.
        values: value of a unit of mass at each pixel, ``(N, C, H, W)``.

    Returns:
        The plan ``(N, K, R)``.
    """
    value, place = _best_at_each_distance(transport, values)
    price = value.new_tensor([transport.neighbourhood.costs[ring[0]] for ring in transport.neighbourhood.rings])
    nodes, slopes, lengths = [torch.zeros_like(place[:, :1])], [], []
    for _ in range(len(price) - 1):
        now = nodes[-1]
        length = price.view(1, -1, 1) - price[now]
        rise = torch.where(length > 0, value - value.gather(1, now), -torch.inf)
        slope, step = (rise / length.clamp_min(1e-6)).max(1, keepdim=True)
        worth = slope > 0
        if not bool(worth.any()):
            break
        nodes.append(torch.where(worth, step, now))
        slopes.append(slope.clamp_min(0))
        lengths.append(price[nodes[-1]] - price[now])
    plan = transport.identity_plan()
    if not slopes:
        return plan
    bills = torch.cat(lengths, 1) * transport.masses.unsqueeze(1)
    # Slopes decrease along a hull, and the sort is stable, so a segment is never used before the segments that lead to it.
    shares = _spend(transport.budget, bills.flatten(1), torch.cat(slopes, 1).flatten(1)).view_as(bills)
    reached = torch.cat([torch.ones_like(shares[:, :1]), shares, torch.zeros_like(shares[:, :1])], 1)
    plan.zero_()
    for index, node in enumerate(nodes):
        amount = (reached[:, index] - reached[:, index + 1]).clamp_min(0) * transport.masses
        plan.scatter_add_(1, place.gather(1, node), amount.unsqueeze(1))
    return plan


def _best_at_each_distance(transport: LocalTransport, values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value in each ring around a pixel, ``(N, rings, R)``, and the index of that neighbour."""
    seen = transport.gather_neighbours(values).masked_fill(~transport.inside, -torch.inf)
    best, places = [], []
    for ring in transport.neighbourhood.rings:
        value, at = seen[:, list(ring)].max(1)
        best.append(value)
        places.append(torch.tensor(ring, device=at.device)[at])
    return torch.stack(best, 1), torch.stack(places, 1)


def _spend(budget: Tensor, bills: Tensor, worth: Tensor) -> Tensor:
    """The share of each cost in ``bills`` ``(N, M)`` that the budget ``(N,)`` pays for, in order of decreasing ``worth``."""
    order = worth.argsort(dim=1, descending=True, stable=True)
    ordered = bills.gather(1, order)
    left = budget.unsqueeze(1) - (ordered.cumsum(1) - ordered)
    paid = (left / ordered.clamp_min(torch.finfo(bills.dtype).tiny)).clamp(0, 1)
    return torch.empty_like(paid).scatter_(1, order, paid)

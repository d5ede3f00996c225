"""The cheapest plan between two images, nearly: what an ascent over plans must ask for, if it is to spend its budget on the image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport
from lightning_wdefense.attacks.wasserstein.projection import rescale_rows


class Potentials(NamedTuple):
    """Multipliers of what leaves the pixels and of what arrives in them, from which the next search can start.

    Attributes:
        leaving: ``(N, 1, R)``.
        arriving: ``(N, C, H, W)``.
    """

    leaving: Tensor
    arriving: Tensor

    @classmethod
    def zeros(cls, transport: LocalTransport) -> Potentials:
        """Of plans that may be as dear as they are."""
        masses = transport.masses
        return cls(torch.zeros_like(masses).unsqueeze(1), masses.new_zeros(transport.shape))

    def select(self, index: Tensor) -> Potentials:
        """Those of some of the images."""
        return Potentials(self.leaving[index], self.arriving[index])


def cheaper_plan(
    transport: LocalTransport, plan: Tensor, potentials: Potentials, *, iterations: int
) -> tuple[Tensor, Potentials]:
    """A plan that makes nearly the same image and costs less, where another one does.

    Some steps of the primal-dual method (Chambolle and Pock, 2011) on the linear program of the cheapest plan. From the potentials of an
    image nearby a few are enough; the image moves by as much as they have not converged.

    Args:
        transport: the constraints, of which the room does not matter.
        plan: ``(N, K, R)``, whose rows have the masses of the pixels.
        potentials: those of the last time.
        iterations: how many steps.

    Returns:
        The plan, of the same masses, and the potentials.
    """
    image, masses, costs = transport.transported(plan), transport.masses.unsqueeze(1), transport.costs
    # Every entry is in one row and arrives in one pixel, so this is the largest step that is safe, shared out by the units of both sides.
    step = math.sqrt(1 / (2 * len(costs)))
    unit = masses.amax(2, keepdim=True) / float(costs.max())
    leaving, arriving = potentials
    for _ in range(iterations):
        before = plan
        plan = (plan + step * unit * (leaving + transport.gather_neighbours(arriving) - costs)).clamp_min_(0)
        plan = plan.mul_(transport.inside)
        ahead = 2 * plan - before
        leaving = leaving + step / unit * (masses - ahead.sum(1, keepdim=True))
        arriving = arriving + step / unit.unsqueeze(1) * (image - transport.transported(ahead))
    return rescale_rows(transport, plan), Potentials(leaving, arriving)

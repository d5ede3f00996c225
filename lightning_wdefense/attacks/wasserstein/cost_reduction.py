"""Replace a transport plan by a cheaper plan that makes nearly the same image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport
from lightning_wdefense.attacks.wasserstein.projection import rescale_rows


class Potentials(NamedTuple):
    """Dual potentials of the two marginals of a plan, from which the next search can start.

    Attributes:
        leaving: dual potentials of the first marginal, the mass that leaves each pixel, ``(N, 1, R)``.
        arriving: dual potentials of the second marginal, the mass that arrives in each pixel, ``(N, C, H, W)``.
    """

    leaving: Tensor
    arriving: Tensor

    @classmethod
    def zeros(cls, transport: LocalTransport) -> Potentials:
        """Potentials of 0."""
        masses = transport.masses
        return cls(torch.zeros_like(masses).unsqueeze(1), masses.new_zeros(transport.shape))

    def select(self, index: Tensor) -> Potentials:
        """The potentials of some of the images."""
        return Potentials(self.leaving[index], self.arriving[index])


def cheaper_plan(
    transport: LocalTransport, plan: Tensor, potentials: Potentials, *, iterations: int
) -> tuple[Tensor, Potentials]:
    """A plan that makes nearly the same image at a lower cost, if there is one.

    It takes some steps of the primal-dual method (Chambolle and Pock, 2011) on the linear program of the cheapest plan.
    From the potentials of a similar image a few steps are enough. The image changes as long as the method has not
    converged.

    Args:
        transport: the constraints; the capacities are ignored.
        plan: ``(N, K, R)``, whose rows sum to the masses of the pixels.
        potentials: potentials to start from.
        iterations: number of steps.

    Returns:
        The plan, with the same first marginal, and the potentials.
    """
    image, masses, costs = transport.transported(plan), transport.masses.unsqueeze(1), transport.costs
    # Each entry of the plan is in one row and arrives in one pixel, which gives the largest safe step. ``unit`` balances the units of
    # the primal and the dual step.
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

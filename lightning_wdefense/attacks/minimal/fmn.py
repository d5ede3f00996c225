"""FMN, the fast minimum-norm attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.minimal.base import Closest, MinimalAttack
from lightning_wdefense.attacks.minimal.schedule import check_search, cosine, first_step, linear_distance
from lightning_wdefense.attacks.norms import BALLS, per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class FMN(MinimalAttack):
    """The fast minimum-norm attack: gradient ascent on the margin inside a ball whose radius each sample adapts.

    The radius shrinks while the sample is misclassified, and grows while it is not. Until a sample has been misclassified for the
    first time, its radius is the distance to the boundary of the linearised model.

    Args:
        threat: the threat model (norm ``linf``, ``l2`` or ``l1``); its eps is not used.
        steps: number of gradient steps.
        step_size: L2 length of the first step, in data units, from which the steps fall by a cosine to a hundredth; ``None`` for the
            range of the bounds, or without bounds for four times the distance to the boundary of the linearised model.
        shrinkage: share by which a radius changes in the first step; it falls by a cosine to ``final_shrinkage``.
        final_shrinkage: the same in the last step.
        tightening: number of forward passes that bisect between the clean and the adversarial input at the end.
        seed: not used, the attack draws no noise.

    Raises:
        ValueError: for another norm, or if a number is out of its range.

    References:
        Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints", NeurIPS 2021.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import FMN, ThreatModel
        >>> inputs, labels = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> found = FMN(ThreatModel(norm="linf", bounds=None))(torch.nn.Identity(), inputs, labels)
        >>> [round(distance, 2) for distance in found.distances.tolist()]
        [1.5, 0.0]
    """

    name: ClassVar[str] = "fmn"
    norms: ClassVar[tuple[str, ...]] = tuple(BALLS)

    threat: ThreatModel
    steps: int = 100
    step_size: float | None = None
    shrinkage: float = 0.05
    final_shrinkage: float = 0.001
    tightening: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.steps, self.step_size, self.tightening)
        for name in ("shrinkage", "final_shrinkage"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")

    def search(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The closest adversarial inputs and their distances, in data units."""
        threat, ball = self.threat, self.threat.ball
        closest, data = Closest(problem), problem.data.clone()
        radius = torch.full_like(closest.distances, torch.inf)
        length = None
        for step in range(self.steps):
            outputs, gradient = problem.outputs_and_gradient(data, "margin")
            fooled, margins = problem.fooled(outputs), problem.loss(outputs, "margin").detach().to(radius.dtype)
            closest.keep(data, fooled)
            share = cosine(step, self.steps, self.shrinkage, self.final_shrinkage)
            linear = ball.length(data - problem.data) + linear_distance(margins, ball.dual(gradient))
            # A little beyond the boundary, where rounding does not decide.
            grown = torch.where(closest.distances.isfinite(), radius, linear) * (1 + share)
            radius = torch.where(fooled, torch.minimum(radius, closest.distances) * (1 - share), grown)
            if length is None:
                length = first_step(self.step_size, problem, margins, gradient)
            size = per_sample(length * cosine(step, self.steps, 1.0, 0.01), data)
            moved = BALLS["l2"].steepest(gradient).mul_(size).add_(data)
            data = threat.project_(moved, problem.data, problem.box, radius)
        closest.keep(data, problem.fooled(problem.outputs(data)))
        closest.tighten(self.tightening)
        return closest.data, closest.distances

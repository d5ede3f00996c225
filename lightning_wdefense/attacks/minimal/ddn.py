"""DDN, the attack that decouples the direction of a perturbation from its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.minimal.base import Closest, MinimalAttack
from lightning_wdefense.attacks.minimal.schedule import check_search, cosine, first_step
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class DDN(MinimalAttack):
    """Decoupled direction and norm: gradient ascent on the cross-entropy, on a sphere whose radius each sample adapts.

    The radius shrinks by a fixed share while the sample is misclassified, and grows by it while it is not.

    Args:
        threat: the threat model (norm ``l2``); its eps is not used.
        steps: number of gradient steps.
        step_size: length of the first step and first radius, in data units; the steps fall by a cosine to a hundredth. ``None`` for
            the range of the bounds, or without bounds for four times the distance to the boundary of the linearised model.
        shrinkage: share by which a radius changes in each step.
        tightening: number of forward passes that bisect between the clean and the adversarial input at the end.
        seed: not used, the attack draws no noise.

    Raises:
        ValueError: for another norm, or if a number is out of its range.

    References:
        Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and defenses", CVPR 2019.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import DDN, ThreatModel
        >>> inputs, labels = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> found = DDN(ThreatModel(norm="l2", bounds=None))(torch.nn.Identity(), inputs, labels)
        >>> [round(distance, 2) for distance in found.distances.tolist()]
        [2.12, 0.0]
    """

    name: ClassVar[str] = "ddn"
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    threat: ThreatModel
    steps: int = 100
    step_size: float | None = None
    shrinkage: float = 0.05
    tightening: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.steps, self.step_size, self.tightening)
        if not 0 < self.shrinkage < 1:
            raise ValueError(f"shrinkage must be between 0 and 1, got {self.shrinkage}.")

    def search(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The closest adversarial inputs and their distances, in data units."""
        ball = self.threat.ball
        closest, data = Closest(problem), problem.data.clone()
        if self.step_size is None and self.threat.bounds is None:
            outputs, gradient = problem.outputs_and_gradient(data, "margin")
            length = first_step(None, problem, problem.loss(outputs, "margin").detach().to(data.dtype), gradient)
        else:
            length = first_step(self.step_size, problem, closest.distances, data)
        radius = length
        for step in range(self.steps):
            outputs, gradient = problem.outputs_and_gradient(data, "ce")
            fooled = problem.fooled(outputs)
            closest.keep(data, fooled)
            radius = radius * torch.where(fooled, 1 - self.shrinkage, 1 + self.shrinkage)
            size = per_sample(length * cosine(step, self.steps, 1.0, 0.01), data)
            delta = ball.steepest(gradient).mul_(size).add_(data).sub_(problem.data)
            tiny = torch.finfo(delta.dtype).tiny
            data = problem.box.clamp_(delta.mul_(per_sample(radius / ball.length(delta).clamp_min(tiny), delta)).add_(problem.data))
        closest.keep(data, problem.fooled(problem.outputs(data)))
        closest.tighten(self.tightening)
        return closest.data, closest.distances

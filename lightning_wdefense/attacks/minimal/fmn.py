"""FMN, the fast minimum-norm attack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.labels import class_labels, hard_labels, likeliest_wrong
from lightning_wdefense.attacks.losses import AttackLoss
from lightning_wdefense.attacks.minimal.base import Closest, MinimalAttack
from lightning_wdefense.attacks.minimal.radius import check_search, cosine, linear_distance
from lightning_wdefense.attacks.norms import BALLS, per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logits_of


@dataclass(frozen=True)
class FMN(MinimalAttack):
    """The fast minimum-norm attack: gradient ascent on the margin inside a ball whose radius each sample adapts.

    The radius shrinks while the sample is misclassified, and grows while it is not. Until a sample has been misclassified for the
    first time, its radius is the distance to the boundary of the linearised model.

    Args:
        threat: the threat model (norm ``linf``, ``l2`` or ``l1``); its eps is not used.
        steps: number of gradient steps.
        step_size: length of the first step as a multiple of the radius; it falls by a cosine to a hundredth. In L1 it is an L2 length.
        shrinkage: share by which a radius changes in the first step; it falls by a cosine to ``final_shrinkage``.
        final_shrinkage: the same in the last step.
        targets: number of further runs, each of which aims at another of the likeliest wrong classes. One run may end at the boundary of
            a class that is not the nearest. For claims; 9 is AutoAttack's number.
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
    step_size: float = 2.0
    shrinkage: float = 0.05
    final_shrinkage: float = 0.001
    targets: int = 0
    tightening: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.steps, self.step_size, self.tightening)
        if self.targets < 0:
            raise ValueError(f"targets must not be negative, got {self.targets}.")
        for name in ("shrinkage", "final_shrinkage"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")

    def search(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The closest adversarial inputs and their distances, in data units."""
        closest = self._run(problem, "margin")
        if self.targets:
            logits = logits_of(problem.outputs(problem.data))
            right = hard_labels(class_labels(problem.labels, logits))
            for target in likeliest_wrong(logits, right, self.targets).unbind(1):
                found = self._run(problem, partial(_lead, torch.stack([right, target], 1)))
                closest.keep(found.data, found.distances.isfinite(), found.distances)
        return closest.data, closest.distances

    def _run(self, problem: Problem, loss: AttackLoss) -> Closest:
        """One run, which climbs a loss whose zero is the boundary."""
        threat, ball = self.threat, self.threat.ball
        closest, data = Closest(problem), problem.data.clone()
        radius = torch.zeros_like(closest.distances)
        for step in range(self.steps):
            outputs, gradient = problem.outputs_and_gradient(data, loss)
            fooled = problem.fooled(outputs)
            closest.keep(data, fooled)
            share = cosine(step, self.steps, self.shrinkage, self.final_shrinkage)
            linear = ball.length(data - problem.data) + linear_distance(problem, outputs, gradient, loss)
            # A little beyond the boundary, where rounding does not decide; and growing, for the linearised model may be wrong.
            wider = torch.where(closest.distances.isfinite(), radius, torch.maximum(linear, radius)) * (1 + share)
            radius = torch.where(fooled, torch.minimum(radius, closest.distances) * (1 - share), wider)
            length = radius * cosine(step, self.steps, self.step_size, self.step_size / 100)
            if threat.norm == "l1":  # the projection makes the perturbation sparse, the steps need not
                moved = BALLS["l2"].steepest(gradient).mul_(per_sample(length, data)).add_(data)
            else:
                moved = problem.step(gradient, data, length).add_(data)
            data = threat.project_(moved, problem.data, problem.box, radius)
        closest.keep(data, problem.fooled(problem.outputs(data)))
        closest.tighten(self.tightening)
        return closest


def _lead(classes: Tensor, outputs: Any, labels: Any) -> Tensor:
    """The lead ``(N,)`` of the second of two classes ``(N, 2)`` over the first."""
    pair = float32_or_better(logits_of(outputs)).gather(1, classes)
    return pair[:, 1] - pair[:, 0]

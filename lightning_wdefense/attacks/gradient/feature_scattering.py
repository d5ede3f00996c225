"""Feature scattering: move the batch's outputs away from the clean ones, as a cloud.

As a *defence* it does not hold: training on it reported 60.6% robust accuracy under PGD on CIFAR-10, of which AutoAttack
leaves 36.6%. It flattens the loss around the inputs, where gradient attacks get stuck. Combine it with other objectives or
compare against it, and never judge a model that was trained on it by PGD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.losses import check_divergence, divergence_of
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import check_logits, logit_rows
from lightning_wdefense.transport import sinkhorn_divergence


@dataclass(frozen=True)
class FeatureScattering(Attack):
    """Projected gradient ascent on the transport cost between the clean and the adversarial batch's logits.

    It needs no labels, and a sample's perturbation depends on its batch. Models trained on it look robust to PGD and are
    not: 60.6% under PGD, 36.6% under AutoAttack (CIFAR-10). Judge them by AutoAttack alone.

    Args:
        threat: what the attacker may do (norm ``linf`` or ``l2``).
        steps: number of gradient steps, from a start drawn uniformly in the ball.
        step_size: length of a step in data units; ``None`` for ``eps`` if there is one step, else ``2.5 * eps / steps``.
        divergence: differentiable ``(clean, adversarial) -> scalar`` of logits ``(N, D)``; ``None`` for
            ``SinkhornDivergence()``. The paper's code has the cosine cost, ``SinkhornDivergence(cost="cosine")``, which is
            blind to the size of a single logit.
        seed: seeds the noise of calls that are given no generator.

    Raises:
        ValueError: for a norm without a ball, ``steps`` below 1, or a step size that is not positive.
        TypeError: if ``divergence`` is not callable.

    References:
        Zhang and Wang, "Defense against adversarial attacks using feature scattering-based adversarial training", 2019.
        Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020 (the 36.6%).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = FeatureScattering(ThreatModel(norm="linf", eps=0.1))
        >>> inputs = torch.rand(8, 4)
        >>> bool((attack(model, inputs) - inputs).abs().max() <= 0.1 + 1e-6)
        True
    """

    name: ClassVar[str] = "feature-scattering"

    threat: ThreatModel
    steps: int = 1
    step_size: float | None = None
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.threat.ball
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive (data units), got {self.step_size}.")
        check_divergence(self.divergence)

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        ball, eps = self.threat.ball, self.threat.eps
        step = self.step_size or (eps if self.steps == 1 else 2.5 * eps / self.steps)
        problem = problem.with_clean_outputs()
        data = problem.box.clamp(problem.data + ball.uniform(problem.data, eps, problem.generator))
        for index in range(self.steps):
            data = problem.project(data + step * ball.steepest(self._gradient(problem, data, check=index == 0)))
        return data

    def _gradient(self, problem: Problem, data: Tensor, *, check: bool) -> Tensor:
        point = data.detach().requires_grad_()
        outputs = problem.forward(point)
        if check:
            check_logits(outputs)
        divergence = self.divergence or sinkhorn_divergence
        value = divergence_of(divergence, logit_rows(problem.clean_outputs), logit_rows(outputs))
        # The divergence is a mean over the batch: gradients of the sum are of one size whatever the batch's.
        return problem.differentiate(value, point, value.new_tensor(float(len(data))))

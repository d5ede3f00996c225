"""PGD with a soft projection whose strength can be learned in training (UDR)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_wdefense.attacks.gradient.pgd import PGD
from lightning_wdefense.attacks.multiplier import LearnedAttack
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.modules.outputs import float32_or_better


@dataclass(frozen=True)
class SoftBallPGD(PGD, LearnedAttack):
    """PGD with a soft projection onto the ball (UDR); the bounds are still enforced.

    After each step the perturbation ``d`` becomes ``d - multiplier * (d - project(d))``. With a multiplier of 1 or more
    this is :class:`PGD`; with 0 there is no projection. The multiplier is the paper's ``lambda * alpha / tau`` with
    ``tau = alpha``, as in the paper's code. It can be learned in training, see :class:`LearnedAttack`: it falls while
    the average displacement is below ``eps``, and grows above. The results may leave the ball, so this attack is for
    training only.

    Args:
        threat: the threat model (norm ``linf``, ``l2`` or ``l1``).
        steps: number of gradient steps.
        step_size: length of a step in data units; ``None`` for ``2.5 * eps / steps``.
        random_start: as for :class:`PGD`.
        restarts: as for :class:`PGD`.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls without a generator.
        multiplier: share of the distance to the ball that each step removes.
        multiplier_rate: step size of the dual ascent: change of the multiplier per data unit between the displacement
            and ``eps``, at each batch. The paper's code takes 0.02 every 10 batches, which is 0.002 per batch.

    Raises:
        ValueError: as :class:`PGD`, or if the multiplier or its rate is negative or not finite.

    References:
        Bui et al., "A unified Wasserstein distributional robustness framework for adversarial training", 2022.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import ThreatModel
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = SoftBallPGD(ThreatModel(norm="linf", eps=0.1), steps=5, multiplier=0.5)
        >>> inputs = torch.full((2, 4), 0.5)
        >>> adversarial = attack(model, inputs, torch.tensor([0, 2]))
        >>> bool(attack.displacement(inputs, adversarial) > 0.1)
        True
        >>> round(attack.updated_multiplier(0.15), 6)
        0.5001
    """

    name: ClassVar[str] = "soft-ball-pgd"

    multiplier: float = 1.0
    multiplier_rate: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier", "multiplier_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball: no, the multiplier may be below 1."""
        return False

    def displacement(self, inputs: Tensor, adversarial: Tensor) -> Tensor:
        """The displacement in data units.

        For ``linf`` it is the mean of ``|d|`` over all elements, as in the paper's code; for ``l2`` the mean norm of
        the samples.
        """
        to_data = self.threat.to_data
        delta = to_data(float32_or_better(adversarial.detach())) - to_data(float32_or_better(inputs.detach()))
        return delta.abs().mean() if self.threat.norm == "linf" else self.threat.ball.length(delta).mean()

    def updated_multiplier(self, displacement: float | Tensor) -> float:
        """``max(0, multiplier - multiplier_rate * (eps - displacement))``."""
        return max(self.multiplier - self.multiplier_rate * (self.threat.eps - float(displacement)), 0.0)

    def _move(self, problem: Problem, data: Tensor, gradient: Tensor) -> Tensor:
        """One step of ascent, the soft projection, and the clamp into the box; may overwrite the gradient."""
        if self.multiplier >= 1:
            return super()._move(problem, data, gradient)
        ball = self.threat.ball
        delta = problem.step(gradient, data, self._step).add_(data).sub_(problem.data)
        pulled = delta.lerp(ball.project(delta, self.threat.eps), self.multiplier)
        return problem.box.clamp_(pulled.add_(problem.data))

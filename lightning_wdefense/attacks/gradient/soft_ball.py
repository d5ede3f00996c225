"""PGD in a ball whose wall gives way (UDR), and learns by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_wdefense.attacks.base import Problem
from lightning_wdefense.attacks.gradient.pgd import PGD
from lightning_wdefense.attacks.multiplier import LearnedAttack
from lightning_wdefense.modules.outputs import float32_or_better


@dataclass(frozen=True)
class SoftBallPGD(PGD, LearnedAttack):
    """PGD whose projection only pulls back a share of what is outside the ball (UDR); the bounds stay hard.

    After each step the perturbation ``d`` becomes ``d - multiplier * (d - project(d))``: with a multiplier of 1 (or above)
    this is :class:`PGD`, with 0 there is no ball. The share is the paper's ``lambda * alpha / tau`` with ``tau = alpha``, as
    in its code. Training may learn the multiplier (see :class:`LearnedAttack`): it falls while the average displacement is
    below ``eps`` and grows above. The results may leave the ball, so this serves training, not evaluation.

    Args:
        threat: what the attacker may do (norm ``linf`` or ``l2``).
        steps: number of gradient steps.
        step_size: length of a step in data units; ``None`` for ``2.5 * eps / steps``.
        random_start: as for :class:`PGD`.
        restarts: as for :class:`PGD`.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls that are given no generator.
        multiplier: share of what is outside the ball that each step pulls back.
        multiplier_rate: step of the dual ascent, for one data unit between displacement and ``eps``. The paper's code
            moves by 0.02 every 10 batches; this is a tenth, for every batch.

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
        """Whether the results stay inside the threat's ball: not promised, the multiplier may fall below 1."""
        return False

    def displacement(self, inputs: Tensor, adversarial: Tensor) -> Tensor:
        """Mean of ``|d|`` over all elements for ``linf`` (as in the paper's code), mean length for ``l2``, in data units."""
        to_data = self.threat.to_data
        delta = to_data(float32_or_better(adversarial.detach())) - to_data(float32_or_better(inputs.detach()))
        return delta.abs().mean() if self.threat.norm == "linf" else self.threat.ball.length(delta).mean()

    def updated_multiplier(self, displacement: float | Tensor) -> float:
        """``max(0, multiplier - multiplier_rate * (eps - displacement))``."""
        return max(self.multiplier - self.multiplier_rate * (self.threat.eps - float(displacement)), 0.0)

    def _move(self, problem: Problem, data: Tensor, gradient: Tensor) -> Tensor:
        """One step of ascent, the way back towards the ball, and into the box; may overwrite the gradient."""
        if self.multiplier >= 1:
            return super()._move(problem, data, gradient)
        ball = self.threat.ball
        delta = ball.steepest(gradient).mul_(self._step).add_(data).sub_(problem.data)
        pulled = delta.lerp(ball.project(delta, self.threat.eps), self.multiplier)
        return problem.box.clamp_(pulled.add_(problem.data))

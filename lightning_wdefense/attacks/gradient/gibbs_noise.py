"""Random noise chosen by its loss, for Sinkhorn distributionally robust optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.losses import AttackLoss, check_loss
from lightning_wdefense.attacks.norms import per_sample, random_normal, random_uniform
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better


@dataclass(frozen=True)
class GibbsNoise(Attack):
    """Draws one of several noisy copies of each sample, with probability ``softmax(loss / temperature)``; needs no gradients.

    Sinkhorn distributionally robust optimisation minimises ``temperature * log mean_m exp(loss(x + spread * noise_m) /
    temperature)``. The gradient of this objective is the mean of the copies' gradients, weighted by these
    probabilities. So the gradient of the loss at one drawn copy is an unbiased estimate, at the cost of a single
    backward pass. The probabilities are computed with the model in eval mode. Normal noise is unbounded, so this attack
    is for training only.

    Args:
        threat: the threat model, for its units and bounds; the copies are clamped into the bounds. Its ``eps`` is the
            default of ``spread``.
        spread: standard deviation of the noise in data units; ``None`` for ``eps``.
        temperature: temperature of the softmax, in units of the loss: the product of the paper's ``lambda`` and
            ``epsilon``. Near 0 the copy with the largest loss is drawn; far above the losses all copies have the same
            probability.
        copies: number of noisy copies of each sample; each costs a forward pass.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``. The estimate is
            unbiased if training minimises the same loss.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss, a ``spread`` that is negative or not finite, a
            ``temperature`` that is not positive and finite, or ``copies`` below 1.

    References:
        Wang, Gao, Xie, "Sinkhorn distributionally robust optimization", 2021.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = GibbsNoise(ThreatModel(eps=0.1), temperature=0.5)
        >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2, 4])
    """

    name: ClassVar[str] = "gibbs-noise"

    threat: ThreatModel
    spread: float | None = None
    temperature: float = 1.0
    copies: int = 8
    loss: AttackLoss = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ValueError(f"spread must be finite and not negative (data units) or None, got {self.spread}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite (units of the loss), got {self.temperature}.")
        check_counts(self, "copies")

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball: no, normal noise is unbounded."""
        return False

    def with_eps(self, eps: float) -> GibbsNoise:
        """The same attack with another perturbation budget ``eps`` (data units); a given spread is scaled in proportion."""
        scaled = self.spread
        if scaled is not None and self.threat.eps > 0:
            scaled = scaled * eps / self.threat.eps
        return replace(self, threat=self.threat.with_eps(eps), spread=scaled)

    def perturb(self, problem: Problem) -> Tensor:
        """The drawn copies, in data units."""
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        spread = self.threat.eps if self.spread is None else self.spread
        picked, best = problem.data, torch.tensor(-torch.inf, device=problem.data.device)
        for index in range(self.copies):
            copy = problem.box.clamp(problem.data + spread * random_normal(problem.data, problem.generator))
            outputs = problem.outputs(copy) if index else problem.forward(copy.clone().requires_grad_())
            loss = float32_or_better(problem.loss(outputs, self.loss, check=index == 0).detach())
            # Gumbel-max trick: the largest loss / temperature + Gumbel noise is a draw from the softmax, with one copy in memory at a time.
            gumbel = -(-random_uniform(loss, problem.generator).log()).log()
            score = loss / self.temperature + gumbel
            better = score > best  # false if the loss is NaN
            picked = torch.where(per_sample(better, copy), copy, picked)
            best = torch.where(better, score, best)
        return picked

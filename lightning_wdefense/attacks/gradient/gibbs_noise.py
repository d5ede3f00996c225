"""Noise picked by its loss: training with it is Sinkhorn distributionally robust optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.losses import AttackLoss, check_loss
from lightning_wdefense.attacks.norms import per_sample, random_normal, random_uniform
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better


@dataclass(frozen=True)
class GibbsNoise(Attack):
    """One of several noisy copies of each sample, drawn with probability ``softmax(loss / temperature)``: no gradients.

    Sinkhorn distributionally robust optimisation minimises ``temperature * log mean_m exp(loss(x + spread * noise_m) /
    temperature)``. Its gradient is the mean of the copies' gradients under just these weights, so the gradient of the loss
    at a copy that is drawn with them is an unbiased estimate of it, at the cost of a single backward pass. (The weights
    are those of the model in eval mode.) Normal noise is in no ball: this serves training, not evaluation.

    Args:
        threat: units and bounds, into which the copies are clamped; its ``eps`` is the default of ``spread``.
        spread: standard deviation of the noise in data units; ``None`` for ``eps``.
        temperature: in units of the loss, the product of the paper's ``lambda`` and ``epsilon``: near 0 the worst copy is
            picked, far above the losses any.
        copies: noisy copies of each sample, that is, forward passes (one at a time, without a graph).
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``; the estimate is
            unbiased if training minimises the same.
        seed: seeds the noise of calls that are given no generator.

    Raises:
        ValueError: for a norm without a ball, an unknown loss, a ``spread`` that is negative or not finite, a
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
        if self.copies < 1:
            raise ValueError(f"copies must be at least 1, got {self.copies}.")

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat's ball: normal noise does not."""
        return False

    def with_eps(self, eps: float) -> GibbsNoise:
        """The same attack at another radius (data units); an explicit spread keeps its ratio to the radius."""
        scaled = self.spread
        if scaled is not None and self.threat.eps > 0:
            scaled = scaled * eps / self.threat.eps
        return replace(self, threat=self.threat.with_eps(eps), spread=scaled)

    def perturb(self, problem: Problem) -> Tensor:
        """The copies that were picked, in data units."""
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        spread = self.threat.eps if self.spread is None else self.spread
        picked, best = problem.data, torch.tensor(-torch.inf, device=problem.data.device)
        for index in range(self.copies):
            copy = problem.box.clamp(problem.data + spread * random_normal(problem.data, problem.generator))
            outputs = problem.outputs(copy) if index else problem.forward(copy.clone().requires_grad_())
            loss = float32_or_better(problem.loss(outputs, self.loss, check=index == 0).detach())
            # The largest of loss / temperature + Gumbel noise is a draw from the softmax, and needs one copy at a time.
            gumbel = -(-random_uniform(loss, problem.generator).log()).log()
            score = loss / self.temperature + gumbel
            better = score > best  # never where the loss is not a number
            picked = torch.where(per_sample(better, copy), copy, picked)
            best = torch.where(better, score, best)
        return picked

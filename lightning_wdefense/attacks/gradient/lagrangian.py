"""The penalised attack of distributionally robust training (WRM), with a penalty on the distance instead of a ball."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class LagrangianAttack(Attack):
    """Gradient ascent on ``loss(x') - gamma * |x' - x|_2^2`` for each sample, in data units, inside the bounds.

    The distance is the squared L2 distance, whatever the threat model's norm. Steps follow the gradient without
    normalisation, so samples with a steep loss move farther. There is no ball, so this attack is for training only.

    Training with it minimises the expectation of ``phi_gamma(x) = max over x' of loss(x') - gamma * |x' - x|^2``. The
    number ``gamma * rho + E[phi_gamma]`` bounds the loss under any shift of the data distribution within mean squared
    distance ``rho``. It is a certificate only if the inner problem is concave and solved: this needs smooth activations
    (no ReLU) and a ``gamma`` above half the Lipschitz constant of the loss's gradient. Otherwise it is an *estimate*,
    which may be too low.

    Args:
        threat: the threat model, for its units and bounds. Its ``eps`` and norm affect only the default of ``gamma``,
            but ``eps=0`` means no attack.
        gamma: penalty per squared data unit of distance, in units of the loss. ``None`` for ``1 / (2 * R)``, where
            ``R`` is the largest L2 norm in the threat model's ball (``eps * sqrt(elements)`` for ``linf``). A sample
            whose gradient has norm 1 then moves by about ``R``.
        steps: number of gradient steps; the paper takes 15, its code one more.
        step_size: factor of the gradient in the first step, in squared data units per unit of the loss; step ``t`` uses
            ``step_size / sqrt(t)``, which damps oscillations, as in the paper's code. ``None`` for ``1 / (2 * gamma)``,
            also as there: it solves a linear loss in one step and converges for a concave problem.
        loss: ``"ce"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls without a generator; the attack itself draws no noise.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss, ``loss="kl"``, ``steps`` below 1, or a ``gamma`` or
            step size that is not positive.

    References:
        Sinha, Namkoong, Duchi, "Certifying some distributional robustness with principled adversarial training", 2018.

    Example:
        >>> import torch
        >>> attack = LagrangianAttack(ThreatModel(norm="l2", bounds=None), gamma=0.25, loss=lambda outputs, _: 3 * outputs)
        >>> attack(lambda inputs: inputs.sum(1), torch.zeros(1, 2))
        tensor([[6., 6.]])
    """

    name: ClassVar[str] = "lagrangian"

    threat: ThreatModel
    gamma: float | None = None
    steps: int = 15
    step_size: float | None = None
    loss: AttackLoss = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        check_counts(self, "steps")
        for name, unit in (("gamma", "loss per squared data unit"), ("step_size", "squared data units per loss")):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite ({unit}) or None, got {value}.")
        if self.loss == "kl":
            raise ValueError(
                'loss="kl" has zero gradient at the clean inputs, where this attack starts: use "ce" or "margin".'
            )

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball: no, there is a penalty instead."""
        return False

    def with_eps(self, eps: float) -> LagrangianAttack:
        """The same attack at another scale ``eps`` (data units): a given ``gamma`` is divided by ``eps / threat.eps``.

        Displacements are about ``gradient / (2 * gamma)``, so they are scaled in proportion to ``eps``; so is a given
        step size.
        """
        ratio = self.threat.ratio_to(eps)
        return replace(
            self,
            threat=self.threat.with_eps(eps),
            gamma=None if self.gamma is None else self.gamma / ratio,
            step_size=None if self.step_size is None else self.step_size * ratio,
        )

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns its losses."""
        return replace(self, loss=outputs_as_losses) if self.loss in ("ce", "margin") else None

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        data = clean = problem.data
        if self.threat.eps == 0:
            return clean
        gamma = self._gamma(clean)
        first = 1 / (2 * gamma) if self.step_size is None else self.step_size
        for index in range(self.steps):
            ascent = problem.gradient(data, self.loss, check=index == 0) - 2 * gamma * (data - clean)
            data = problem.box.clamp(data + first / math.sqrt(index + 1) * ascent)
        return data

    def _gamma(self, data: Tensor) -> float:
        if self.gamma is not None:
            return self.gamma
        elements = data[0].numel() if self.threat.norm == "linf" else 1
        return 1 / (2 * self.threat.eps * math.sqrt(elements))

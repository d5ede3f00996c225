"""The penalised attack of distributionally robust training (WRM): no ball, a price on the distance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class LagrangianAttack(Attack):
    """Gradient ascent on ``loss(x') - gamma * |x' - x|_2^2``, sample by sample, in data units, inside the bounds.

    The distance is the squared L2 one whatever the threat's norm, and steps follow the plain gradient, so samples with
    steep losses move farther. There is no ball: this serves training, not evaluation. Training on its results minimises
    the expectation of ``phi_gamma(x) = max over x' of loss(x') - gamma * |x' - x|^2``, and ``gamma * rho + E[phi_gamma]``
    bounds the loss under any shift of the data within mean squared distance ``rho``. That certificate is only an
    *estimate* from below unless the inner problem is concave and solved: smooth activations (no ReLU) and a ``gamma``
    above half the Lipschitz constant of the loss's gradient.

    Args:
        threat: units and bounds. Its ``eps`` and norm only enter the default of ``gamma``; ``eps=0`` is no attack.
        gamma: price of a unit of squared distance, in units of the loss; ``None`` for ``1 / (2 * R)``, where ``R`` is the
            largest L2 length in the threat's ball (``eps * sqrt(elements)`` for ``linf``): a sample whose gradient has
            length 1 then moves by about ``R``.
        steps: number of gradient steps; the paper takes 15 (its code one more).
        step_size: what the first step multiplies the gradient by; ``None`` for ``1 / (2 * gamma)``, which solves a linear
            loss in one step, contracts if the problem is concave and otherwise goes no farther than the largest gradient
            leads. Step ``t`` takes ``1 / sqrt(t)`` of it, which damps oscillations. Both are as in the paper's code.
        loss: ``"ce"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls that are given no generator; the attack itself draws none.

    Raises:
        ValueError: for a norm without a ball, an unknown loss, ``loss="kl"``, ``steps`` below 1, or a ``gamma`` or step size
            that is not positive.

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
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
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
        """Whether the results stay inside the threat's ball: no, there is a price and no ball."""
        return False

    def with_eps(self, eps: float) -> LagrangianAttack:
        """The same attack at another scale: an explicit ``gamma`` is divided by ``eps / threat.eps``.

        Displacements are about ``gradient / (2 * gamma)``, so they keep their ratio to ``eps``; so does the step size.
        """
        ratio = self.threat.ratio_to(eps)
        return replace(
            self,
            threat=self.threat.with_eps(eps),
            gamma=None if self.gamma is None else self.gamma / ratio,
            step_size=None if self.step_size is None else self.step_size * ratio,
        )

    def of_losses(self) -> Attack | None:
        """The same attack on a model that returns its losses itself."""
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

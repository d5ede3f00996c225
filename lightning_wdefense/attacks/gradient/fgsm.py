"""FGSM and N-FGSM, attacks of a single gradient step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class FGSM(Attack):
    """Fast gradient sign method: one step of length ``eps`` in the direction of steepest ascent of the loss.

    With ``noise > 0`` it is N-FGSM. The step starts from ``x + U(-noise * eps, noise * eps)`` and is *not* projected
    back into the ball, which prevents catastrophic overfitting in single-step adversarial training. N-FGSM is not
    ``bounded``, so it is for training only.

    Args:
        threat: the threat model (norm ``linf``, ``l2`` or ``l1``).
        noise: radius of the random start, in multiples of ``eps``; 2 for N-FGSM.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss, a negative ``noise``, or ``loss="kl"`` without noise.

    References:
        Goodfellow et al., "Explaining and harnessing adversarial examples", 2015. de Jorge et al., "Make some
        noise: reliable and efficient single-step adversarial training", 2022.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = FGSM(ThreatModel(norm="linf", eps=0.1))
        >>> inputs = torch.rand(2, 4)
        >>> adversarial = attack(model, inputs, torch.tensor([0, 2]))
        >>> bool((adversarial - inputs).abs().max() <= 0.1 + 1e-6)
        True
    """

    threat: ThreatModel
    noise: float = 0.0
    loss: AttackLoss = "ce"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        if self.noise < 0:
            raise ValueError(f"noise must not be negative (multiples of eps), got {self.noise}.")
        if self.loss == "kl" and self.noise == 0:
            raise ValueError('loss="kl" has zero gradient at the clean inputs: use noise > 0.')

    @property
    def name(self) -> str:  # type: ignore[override]
        """``"fgsm"``, or ``"n-fgsm"`` with noise."""
        return "n-fgsm" if self.noise > 0 else "fgsm"

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball: only without noise."""
        return self.noise == 0

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns its losses."""
        return replace(self, loss=outputs_as_losses) if self.loss in ("ce", "margin") else None

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        eps = self.threat.eps
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        start = problem.data
        if self.noise > 0:
            start = problem.random_point(self.noise * eps)
        stepped = start + problem.step(problem.gradient(start, self.loss, check=True), start, eps)
        return problem.project(stepped) if self.bounded else stepped

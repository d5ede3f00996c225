"""One-step attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class FGSM(Attack):
    """Fast gradient (sign) method, one step of length ``eps`` along the steepest ascent of the loss.

    With ``noise > 0`` it is N-FGSM: the step is taken from ``x + U(-noise * eps, noise * eps)`` and *not* projected
    back into the ball, which keeps single-step adversarial training from collapsing. Such an attack is not
    ``bounded``: it serves training, not evaluation.

    Args:
        threat: what the attacker may do (norm ``linf`` or ``l2``).
        noise: radius of the noise start, in multiples of ``eps``; N-FGSM's is 2.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        seed: seeds the noise of calls that are given no generator.

    Raises:
        ValueError: for a norm without a ball, an unknown loss, a negative ``noise``, or ``loss="kl"`` without noise.

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
        """Whether the results stay inside the threat's ball: not with noise."""
        return self.noise == 0

    def of_losses(self) -> Attack | None:
        """The same attack on a model that returns its losses itself."""
        return replace(self, loss=outputs_as_losses) if self.loss in ("ce", "margin") else None

    def perturb(self, problem: Problem) -> Tensor:
        """One step from the clean (or noisy) inputs, in data units."""
        ball, eps = self.threat.ball, self.threat.eps
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        start = problem.data
        if self.noise > 0:
            start = problem.box.clamp(start + ball.uniform(start, self.noise * eps, problem.generator))
        stepped = start + eps * ball.steepest(problem.gradient(start, self.loss, check=True))
        return problem.project(stepped) if self.bounded else stepped

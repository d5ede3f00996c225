"""PGD, projected gradient ascent on the loss, the standard attack of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.gradient.start import RandomStart, check_start, start
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent on the loss, inside the ball and the bounds.

    Args:
        threat: the threat model (norm ``linf``, ``l2`` or ``l1``).
        steps: number of gradient steps.
        step_size: length of a step in data units; ``None`` for ``2.5 * eps / steps``.
        random_start: ``True`` for a uniform start in the ball, ``"gaussian"`` for the start of TRADES (standard
            deviation 0.001 of the range of the bounds), ``False`` for a start at the clean inputs, where ``loss="kl"``
            has no gradient.
        restarts: number of runs from different starts. Each sample keeps its worst result. With ``loss`` ``"ce"`` or
            ``"margin"`` later runs attack only the samples that are still classified correctly.
        loss: ``"ce"``, ``"kl"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``.
        early_exit: stop early for each sample: keep it at the first step that misclassifies it (segmentation: in one
            element), and run the model on the others only. It makes training cheaper, but the examples are weaker, and
            the trained model may be less robust. It needs ``loss`` ``"ce"`` or ``"margin"``, and synchronises with the
            device at every step.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss, ``steps`` or ``restarts`` below 1, a step size that
            is not positive, or ``early_exit`` with another loss than ``"ce"`` or ``"margin"``.

    References:
        Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018. Early stopping per
        sample: Zhang et al., "Attacks which do not kill training make adversarial learning stronger", 2020 (friendly
        adversarial training).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = PGD(ThreatModel(norm="l2", eps=0.5), steps=5)
        >>> inputs = torch.rand(2, 4)
        >>> adversarial = attack(model, inputs, torch.tensor([0, 2]))
        >>> bool((adversarial - inputs).norm(dim=1).max() <= 0.5 + 1e-6)
        True
    """

    name: ClassVar[str] = "pgd"

    threat: ThreatModel
    steps: int = 10
    step_size: float | None = None
    random_start: RandomStart = True
    restarts: int = 1
    loss: AttackLoss = "ce"
    early_exit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        check_counts(self, "steps", "restarts")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive (data units), got {self.step_size}.")
        check_start(self.random_start, self.loss)
        if self.early_exit and self.loss not in ("ce", "margin"):
            raise ValueError(
                f'early_exit=True stops at the first misclassification, which loss={self.loss!r} does not define: use loss="ce" or '
                '"margin", or early_exit=False.'
            )

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns its losses, without early exit."""
        return replace(self, loss=outputs_as_losses, early_exit=False) if self.loss in ("ce", "margin") else None

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        adversarial = self._ascend(problem)
        if self.restarts == 1:
            return adversarial
        fooled, worst = self._fooled_and_loss(problem, adversarial)
        for _ in range(self.restarts - 1):
            open_ = (~fooled).nonzero().squeeze(1)
            if not problem.anywhere(len(open_) > 0):
                break
            candidate = self._ascend(part := problem.select(open_))
            newly, loss = self._fooled_and_loss(part, candidate)
            better = newly | (loss > worst[open_])
            adversarial[open_[better]] = candidate[better]
            fooled[open_], worst[open_] = newly, torch.maximum(loss, worst[open_])
        return adversarial

    def _ascend(self, problem: Problem) -> Tensor:
        data = start(problem, self.random_start)
        if self.early_exit:
            return self._ascend_until_fooled(problem, data)
        for index in range(self.steps):
            data = self._move(problem, data, problem.gradient(data, self.loss, check=index == 0))
        return data

    def _ascend_until_fooled(self, problem: Problem, data: Tensor) -> Tensor:
        found, left = data.clone(), torch.arange(len(data), device=data.device)
        for index in range(self.steps):
            outputs, gradient = problem.outputs_and_gradient(data, self.loss, check=index == 0)
            right = (~problem.fooled(outputs)).nonzero().squeeze(1)
            if len(right) < len(left):
                found[left] = data
                problem, data, gradient, left = problem.select(right), data[right], gradient[right], left[right]
            if not problem.anywhere(len(left) > 0):
                break
            data = self._move(problem, data, gradient)
        found[left] = data
        return found

    @property
    def _step(self) -> float:
        return self.step_size if self.step_size is not None else 2.5 * self.threat.eps / self.steps

    def _move(self, problem: Problem, data: Tensor, gradient: Tensor) -> Tensor:
        """One step of ascent and the projection into the ball and the box; may overwrite the gradient."""
        return problem.project_(problem.step(gradient, data, self._step).add_(data))

    def _fooled_and_loss(self, problem: Problem, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are misclassified (none for a loss that does not define it), and the loss of each sample."""
        outputs = problem.outputs(adversarial)
        loss = problem.loss(outputs, self.loss).detach()
        if self.loss in ("ce", "margin"):
            return problem.fooled(outputs), loss
        return torch.zeros_like(loss, dtype=torch.bool), loss

"""An attack that is hard to detect by distribution: it fools the model and leaves the batch's features where they were, as a cloud."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.losses import AttackLoss, check_divergence, check_loss, divergence_of
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logit_rows
from lightning_wdefense.modules.recording import OUTPUTS, ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager, module_of
from lightning_wdefense.transport import sinkhorn_divergence

FeatureForward = Callable[[Tensor], tuple[Any, Tensor]]


@dataclass(frozen=True)
class SinkhornAttack(Attack):
    """Projected gradient ascent on the loss, minus a price on the shift of the batch's features.

    The shift is the Sinkhorn divergence between the features of the clean and of the attacked batch, two clouds: an attacked sample may
    take the place of any clean one, of another class as well, which is what a detector that knows only distributions cannot see.
    Only what is misclassified hides, so that the success is that of an attack without a price, and each sample ends where it was
    misclassified last. A perturbation depends on its batch: larger batches show the distribution better.

    Args:
        threat: what the attacker may do (norm ``linf`` or ``l2``).
        steps: number of gradient steps, from a start drawn uniformly in the ball.
        step_size: length of a step in data units; ``None`` for ``2.5 * eps / steps``.
        weight: price of the shift, in units of the loss for a shift by the typical distance of clean features from their centre.
        features: what is to stay: ``"outputs"``, for any callable model, or of an ``nn.Module`` ``"penultimate"`` (the input of the last
            linear layer that runs) or a dotted path to a submodule, whose output is taken. These run eagerly, also where the model is
            compiled.
        loss: ``"ce"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``, which does not say what is misclassified:
            every sample then hides from the start.
        divergence: differentiable ``(clean, adversarial) -> scalar`` of features ``(N, D)`` at unit scale; ``None`` for
            ``SinkhornDivergence()``.
        seed: seeds the noise of calls that are given no generator.

    Raises:
        ValueError: for a norm without a ball, an unknown loss or ``"kl"``, ``steps`` below 1, a step size that is not positive, or a weight
            that is negative or not finite; at the call, for features that name no submodule.
        TypeError: if ``divergence`` is not callable; at the call, if the features of a submodule are wanted of what is no module.

    References:
        Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019. Carlini and Wagner, "Adversarial
        examples are not easily detected: bypassing ten detection methods", 2017 (attacks that also minimise what a detector sees).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> attack = SinkhornAttack(ThreatModel(norm="l2", eps=0.5), steps=5)
        >>> inputs = torch.rand(8, 4)
        >>> adversarial = attack(model, inputs, torch.arange(8) % 3)
        >>> bool((adversarial - inputs).norm(dim=1).max() <= 0.5 + 1e-6)
        True
    """

    name: ClassVar[str] = "sinkhorn"

    threat: ThreatModel
    steps: int = 40
    step_size: float | None = None
    weight: float = 10.0
    features: str = OUTPUTS
    loss: AttackLoss = "margin"
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive (data units), got {self.step_size}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and not negative, got {self.weight}.")
        if self.loss == "kl":
            raise ValueError('loss="kl" does not say what is misclassified: use "ce", "margin" or a callable.')
        check_divergence(self.divergence)

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        ball, eps = self.threat.ball, self.threat.eps
        step = self.step_size if self.step_size is not None else 2.5 * eps / self.steps
        with self._feature_forward(problem) as forward:
            with torch.no_grad():
                clean = forward(problem.data)[1]
            data = problem.box.clamp(problem.data + ball.uniform(problem.data, eps, problem.generator))
            found, ever = data.clone(), torch.zeros(len(data), dtype=torch.bool, device=data.device)
            for index in range(self.steps):
                fooled, gradient = self._fooled_and_ascent(problem, forward, clean, data, check=index == 0)
                found, ever = torch.where(per_sample(fooled, data), data, found), ever | fooled
                data = problem.project_(ball.steepest(gradient).mul_(step).add_(data))
            latest = self._fooled(problem, problem.outputs(data)) | ~ever
            return torch.where(per_sample(latest, data), data, found)

    def _fooled_and_ascent(
        self, problem: Problem, forward: FeatureForward, clean: Tensor, data: Tensor, *, check: bool
    ) -> tuple[Tensor, Tensor]:
        """Which samples are misclassified, and the direction of ascent."""
        point = data.detach().requires_grad_()
        outputs, features = forward(point)
        losses = problem.loss(outputs, self.loss, check=check)
        fooled = self._fooled(problem, outputs)
        hiding = fooled if self._loss_defines_misclassified else torch.ones_like(fooled)
        shift = self._shift(clean, torch.where(hiding.unsqueeze(1), features, features.detach()))
        # The divergence is a mean over the batch: that of the sum does not depend on the batch's size.
        values = torch.cat([losses, shift.reshape(1).to(losses)])
        weights = torch.ones_like(values)
        weights[-1] = -self.weight * len(data)
        return fooled, problem.differentiate(values, point, weights)

    @property
    def _loss_defines_misclassified(self) -> bool:
        return self.loss in ("ce", "margin")

    def _fooled(self, problem: Problem, outputs: Any) -> Tensor:
        """Which samples are misclassified: never any, where the loss does not say what that means."""
        if self._loss_defines_misclassified:
            return problem.fooled(outputs)
        return torch.zeros(len(problem.data), dtype=torch.bool, device=problem.data.device)

    def _shift(self, clean: Tensor, features: Tensor) -> Tensor:
        centre = clean.mean(0)
        scale = (clean - centre).square().sum(1).mean().sqrt()
        scale = scale.where(scale > 0, scale.new_ones(()))  # a single sample, or a model that says one thing
        divergence = self.divergence or sinkhorn_divergence
        return divergence_of(divergence, (clean - centre) / scale, (features - centre) / scale)

    @contextlib.contextmanager
    def _feature_forward(self, problem: Problem) -> Iterator[FeatureForward]:
        """A pass that returns the outputs and the features ``(N, D)``."""
        if self.features == OUTPUTS:

            def forward(data: Tensor) -> tuple[Any, Tensor]:
                outputs = problem.forward(data)
                return outputs, logit_rows(outputs)

            yield forward
            return
        module = module_of(problem.model)
        if module is None:
            raise TypeError(
                f'features={self.features!r} needs an nn.Module, got {type(problem.model).__name__}: use features="outputs".'
            )
        recorder = ForwardRecorder(module, self.features)

        def recorded_forward(data: Tensor) -> tuple[Any, Tensor]:
            with recorder.recording() as recording:
                outputs = problem.forward(data)
            return outputs, float32_or_better(recorder.features_of(outputs, recording, len(data))).flatten(1)

        with eager():
            recorder.attach(lambda: problem.outputs(problem.data), temporary=True)
            try:
                yield recorded_forward
            finally:
                recorder.detach()

"""An attack that is hard to detect: it fools the model and keeps the distribution of the batch's features."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.losses import AttackLoss, check_divergence, check_loss, divergence_of
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logit_rows
from lightning_wdefense.modules.recording import OUTPUTS, ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager, module_of
from lightning_wdefense.transport import sinkhorn_divergence

FeatureForward = Callable[[Tensor], tuple[Any, Tensor]]


@dataclass(frozen=True)
class SinkhornAttack(Attack):
    """Projected gradient ascent on the loss minus a penalty on the shift of the batch's features.

    The shift is the Sinkhorn divergence between the features of the clean and of the adversarial batch, as point
    clouds. So an adversarial sample may take the place of any clean sample, also of another class, and a detector that
    compares only the two distributions does not see it. Only misclassified samples pay the penalty, so the success rate
    is that of an attack without a penalty. Each sample keeps the last step at which it was misclassified. A
    perturbation depends on its batch: larger batches represent the distribution better.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``).
        steps: number of gradient steps, from a uniform random start in the ball.
        step_size: length of a step in data units; ``None`` for ``2.5 * eps / steps``.
        weight: weight of the penalty, in units of the loss. The shift is measured in units of the root mean squared
            distance of the clean features from their mean.
        features: the features whose distribution is kept. ``"outputs"`` works for any callable model. For an
            ``nn.Module`` it may also be ``"penultimate"`` (the input of the last linear layer that runs) or a dotted
            path to a submodule, whose output is taken. With these two the model runs eagerly, even if it is compiled.
        loss: ``"ce"``, ``"margin"``, or a callable ``(outputs, labels) -> per-sample loss``. A callable does not define
            misclassification, so with it all samples pay the penalty from the start.
        divergence: differentiable callable ``(clean, adversarial) -> scalar`` of features ``(N, D)`` at unit scale;
            ``None`` for ``SinkhornDivergence()``.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss or ``"kl"``, ``steps`` below 1, a step size that is
            not positive, or a weight that is negative or not finite; at the call, if ``features`` names no submodule.
        TypeError: if ``divergence`` is not callable; at the call, if ``features`` needs an ``nn.Module`` and the model
            is none.

    References:
        Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019. Carlini and
        Wagner, "Adversarial examples are not easily detected: bypassing ten detection methods", 2017 (attacks with the
        detector's score in their loss).

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
    divergence: Callable[[Tensor, Tensor], TensorResult] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        check_counts(self, "steps")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive (data units), got {self.step_size}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and not negative, got {self.weight}.")
        if self.loss == "kl":
            raise ValueError(
                'loss="kl" does not say which samples are misclassified: use "ce", "margin" or a callable.'
            )
        check_divergence(self.divergence)

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        eps = self.threat.eps
        step = self.step_size if self.step_size is not None else 2.5 * eps / self.steps
        with self._feature_forward(problem) as forward:
            with torch.no_grad():
                clean = forward(problem.data)[1]
            data = problem.random_point(eps)
            found, ever = data.clone(), torch.zeros(len(data), dtype=torch.bool, device=data.device)
            for index in range(self.steps):
                fooled, gradient = self._fooled_and_ascent(problem, forward, clean, data, check=index == 0)
                found, ever = torch.where(per_sample(fooled, data), data, found), ever | fooled
                data = problem.project_(problem.step(gradient, data, step).add_(data))
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
        # The divergence is a mean over the batch. Its multiple by the batch size has gradients that do not depend on the batch size.
        values = torch.cat([losses, shift.reshape(1).to(losses)])
        weights = torch.ones_like(values)
        weights[-1] = -self.weight * len(data)
        return fooled, problem.differentiate(values, point, weights)

    @property
    def _loss_defines_misclassified(self) -> bool:
        return self.loss in ("ce", "margin")

    def _fooled(self, problem: Problem, outputs: Any) -> Tensor:
        """Which samples are misclassified; none for a loss that does not define it."""
        if self._loss_defines_misclassified:
            return problem.fooled(outputs)
        return torch.zeros(len(problem.data), dtype=torch.bool, device=problem.data.device)

    def _shift(self, clean: Tensor, features: Tensor) -> Tensor:
        centre = clean.mean(0)
        scale = (clean - centre).square().sum(1).mean().sqrt()
        scale = scale.where(scale > 0, scale.new_ones(()))  # a single sample, or a model with constant outputs
        divergence = self.divergence or sinkhorn_divergence
        return divergence_of(divergence, (clean - centre) / scale, (features - centre) / scale)

    @contextlib.contextmanager
    def _feature_forward(self, problem: Problem) -> Iterator[FeatureForward]:
        """A forward pass that returns the outputs and the features ``(N, D)``."""
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

"""The Wasserstein distance between clean and adversarial features, estimated by a critic that is trained with the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._dtype import default_dtype
from lightning_wdefense.attacks.labels import class_labels
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.modules.outputs import logits_of
from lightning_wdefense.modules.state.isolation import eager
from lightning_wdefense.transport import CriticTraining, WassersteinCritic
from lightning_wdefense.transport.critic.layerwise import check_rate
from lightning_wdefense.transport.critic.lipschitz import Lipschitz
from lightning_wdefense.transport.critic.network import Average, check_settings
from lightning_wdefense.transport.critic.training import check_max_steps


@dataclass(frozen=True)
class CriticDiscrepancy:
    """The 1-Wasserstein distance ``W_1`` between clean and adversarial features of each class, estimated by a critic (as in WGAN).

    By default the critic has one function per class. A critic without classes accepts that an attacked 3 has the features of a
    clean 8. On MNIST such a critic cost 25 points of robust accuracy, at a weight at which the critic with classes gained 4.

    Before each training step of the model, the critic is trained on the batch's detached features, for up to ``max_steps`` steps
    (see :class:`~lightning_wdefense.transport.CriticTraining`). Then the model minimises the critic's gap. With a gradient penalty
    the gap can exceed ``W_1``, so it is divided by the critic's gradient norm where this is above 1. The gradient of a 1-Lipschitz
    critic is at most 1 for every sample, near or far; the gradient of paired L2 is largest for the samples that moved farthest.

    This class is only a configuration. The critic is created at the first batch, for the shape and device of the features. It is
    saved in the checkpoint of the callback or the mixin, and it is not part of the user's module. Under DDP it is bitwise equal on
    all ranks.

    Args:
        lipschitz: how the critic is kept 1-Lipschitz, see :class:`~lightning_wdefense.transport.WassersteinCritic`.
        penalty: weight of the gradient penalty.
        lr: learning rate of the critic, which is the length of a step.
        max_steps: largest number of critic steps per batch.
        by_class: one critic function per class. Needs labels that are classes of the outputs, or class probabilities.
        width: width of the hidden layers; ``None`` for the width of the features, between 64 and 256.
        depth: number of hidden layers.
        network: ``(shape of one sample's features) -> module``, instead of the default network; needs ``by_class=False``.
        seed: seed of the initial weights.

    Raises:
        ValueError: if a setting is out of range; at the first batch, if the network cannot be kept Lipschitz (BatchNorm); at any
            batch, if the features do not fit the critic, are not finite, or have fewer than two samples. Neither the critic nor
            the model has then taken a step on the batch.

    References:
        Arjovsky, Chintala, Bottou, "Wasserstein GAN", ICML 2017.
        Shen et al., "Wasserstein distance guided representation learning for domain adaptation", AAAI 2018.

    Example:
        >>> from lightning_wdefense import Recipe, ThreatModel
        >>> critic = CriticDiscrepancy(lipschitz="gradient-penalty")
        >>> Recipe.named("critic", ThreatModel(eps=0.1), discrepancy=critic).discrepancy.penalty
        10.0
    """

    lipschitz: Lipschitz = "orthogonal"
    penalty: float = 10.0
    lr: float = 0.05
    max_steps: int = 5
    by_class: bool = True
    width: int | None = None
    depth: int = 2
    network: Callable[[torch.Size], nn.Module] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by_class and self.network is not None:
            raise ValueError(
                "A network= of your own gets no classes, but by_class=True needs them: set by_class=False."
            )
        check_settings(self.lipschitz, self.penalty, self.width, self.depth, None)
        check_rate(self.lr, orthonormal=self.lipschitz == "orthogonal")
        check_max_steps(self.max_steps)

    def start(self, features: Tensor, classes: int | None = None) -> CriticTraining:
        """A new critic.

        Args:
            features: features ``(N, ...)`` that give the shape, the dtype and the device.
            classes: number of classes, for one function per class; ``None`` for a single function.
        """
        shape, dtype = features.shape[1:], torch.promote_types(features.dtype, torch.float32)
        # Lightning's "true" precisions change the default dtype to one in which no matrix can be made orthonormal.
        with default_dtype(dtype):
            critic = WassersteinCritic(
                shape if self.network is None else self.network(shape),
                lipschitz=self.lipschitz,
                penalty=self.penalty,
                width=self.width,
                depth=self.depth,
                classes=classes,
                seed=self.seed,
            )
        critic.to(features.device, dtype)
        return CriticTraining(critic, lr=self.lr, max_steps=self.max_steps)


class OnlineCritic:
    """A critic that is created at the first batch and trained on every batch.

    Args:
        config: settings of the critic.
    """

    def __init__(self, config: CriticDiscrepancy) -> None:
        self.config = config
        self._training: CriticTraining | None = None
        self._loaded: dict[str, Any] | None = None

    def gap(self, clean: Branch, adversarial: Branch, labels: Any) -> Tensor:
        """The critic's gap between clean and adversarial features, a scalar in units of the features; differentiable in both."""
        training, labels = self._training_on(clean, labels)
        with training.critic.frozen(), eager():
            return training.critic.bounded_gap(clean.features, adversarial.features, labels)

    def update(
        self,
        clean: Branch,
        adversarial: Branch,
        labels: Any,
        *,
        generator: torch.Generator | None = None,
        average: Average | None = None,
        measure: bool = False,
    ) -> dict[str, Any]:
        """Train the critic on the detached features of a batch.

        Args:
            clean: outputs and features of the clean inputs.
            adversarial: outputs and features of the adversarial inputs.
            labels: labels of the batch.
            generator: random generator of the critic's noise.
            average: mean of a tensor over all ranks.
            measure: whether to return measurements.

        Returns:
            With ``measure``, the critic's gap, distance, penalty, gradient norm and steps, before training on the batch;
            otherwise an empty dictionary.
        """
        before = self._training, self._loaded
        training, labels = self._training_on(clean, labels)
        x, y = clean.features.detach(), adversarial.features.detach()
        with eager():
            try:
                said = training.update(x, y, labels, generator=generator, average=average)
            except BaseException:
                self._training, self._loaded = before  # a critic created for an invalid batch must not stay
                raise
            if not measure:
                return {}
            norm = said.gradient_norm
            if not training.critic.penalised:
                norm = training.critic.gradient_norm(x, y, labels, generator=generator).mean()
        return {
            "critic_gap": said.gap,
            "critic_distance": said.distance,
            "critic_penalty": said.penalty,
            "critic_gradient_norm": norm,
            "critic_steps": float(said.steps),
        }

    def state_dict(self) -> dict[str, Any] | None:
        """State of the critic and its training, for a checkpoint; ``None`` before the first batch."""
        return self._loaded if self._training is None else self._training.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the state from a checkpoint at the next batch."""
        self._training, self._loaded = None, state

    def _training_on(self, clean: Branch, labels: Any) -> tuple[CriticTraining, Tensor | None]:
        """The critic, created if it does not exist yet, and the labels in the form that it needs."""
        classes = self._classes(clean, labels) if self.config.by_class else None
        if self._training is None:
            number = None if classes is None else logits_of(clean.outputs).shape[1]
            self._training = self.config.start(clean.features, number)
            if self._loaded is not None:
                self._training.load_state_dict(self._loaded)
                self._loaded = None
        return self._training, classes

    def _classes(self, clean: Branch, labels: Any) -> Tensor:
        with contextlib.suppress(TypeError, ValueError):
            classes = class_labels(labels, clean.outputs, check_values=True)
            if classes.ndim == 1 + classes.is_floating_point():
                return classes
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"A critic with by_class=True needs a class (N,) or class probabilities (N, K) for each sample, got labels {found}. For other "
            "tasks give the recipe discrepancy=CriticDiscrepancy(by_class=False)."
        )

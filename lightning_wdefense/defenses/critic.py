"""The Wasserstein distance between clean and adversarial features by a critic that trains beside the model."""

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
    """``W_1`` between the clean and the adversarial features of each class, as a critic sees it (the WGAN route).

    One function a class, because without classes a critic is content if an attacked 3 has the features of a clean 8: on MNIST that cost 25
    points of robust accuracy at a weight at which this one gained 4.

    Before each step of the model the critic learns from the batch's detached features, as many steps as it is behind (see
    :class:`~lightning_wdefense.transport.CriticTraining`); then the model minimises the critic's gap (under a penalty,
    which lets it overshoot, divided by the length of its gradient where that is more than 1). A 1-Lipschitz critic moves every
    sample's features with the same force at most, near or far: paired L2 pulls hardest at the samples that are lost.

    This is configuration only. The critic itself is made for the features' shape and device at the first batch; it lives in the checkpoint of
    the callback or the mixin, and under DDP it is the same on all ranks to the last bit. It is no part of the user's module.

    Args:
        lipschitz: how it is kept Lipschitz, see :class:`~lightning_wdefense.transport.WassersteinCritic`.
        penalty: weight of a gradient penalty.
        lr: length of a step of the critic.
        max_steps: most steps of the critic on a batch.
        by_class: one function a class; needs labels that are classes of the outputs, or their probabilities.
        width: of its hidden layers; ``None`` for that of the features, from 64 to 256.
        depth: number of its hidden layers.
        network: ``shape of one sample's features -> module``, in place of the network that is built; with ``by_class=False``.
        seed: of its weights.

    Raises:
        ValueError: for settings out of range; at the first batch, for a network that does not go with ``lipschitz`` (BatchNorm), and at any,
            for features that do not fit it, are not finite, or come from fewer than two samples; before the critic or the model takes a step.

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
            raise ValueError("A network of your own takes no classes: set by_class=False.")
        check_settings(self.lipschitz, self.penalty, self.width, self.depth, None)
        check_rate(self.lr, orthonormal=self.lipschitz == "orthogonal")
        check_max_steps(self.max_steps)

    def start(self, features: Tensor, classes: int | None = None) -> CriticTraining:
        """A new critic for features like these ``(N, ...)``, with one function for each of so many classes."""
        shape, dtype = features.shape[1:], torch.promote_types(features.dtype, torch.float32)
        # Lightning's "true" precisions change the default to one in which no matrix can be made orthonormal.
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
    """A critic in training, from its first batch on.

    Args:
        config: what kind of critic.
    """

    def __init__(self, config: CriticDiscrepancy) -> None:
        self.config = config
        self._training: CriticTraining | None = None
        self._loaded: dict[str, Any] | None = None

    def gap(self, clean: Branch, adversarial: Branch, labels: Any) -> Tensor:
        """The critic's gap between two batches of features, differentiable in both, without the overshoot of a weak penalty."""
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
        """Learn from a batch of features, which are constants in it.

        Returns:
            With ``measure``, what the critic said of the batch before it learned from it; else nothing.
        """
        before = self._training, self._loaded
        training, labels = self._training_on(clean, labels)
        x, y = clean.features.detach(), adversarial.features.detach()
        with eager():
            try:
                said = training.update(x, y, labels, generator=generator, average=average)
            except BaseException:
                self._training, self._loaded = before  # one that was made for a batch that does not do is no critic
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
        """For the checkpoint; ``None`` before the first batch."""
        return self._loaded if self._training is None else self._training.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint, at the next batch."""
        self._training, self._loaded = None, state

    def _training_on(self, clean: Branch, labels: Any) -> tuple[CriticTraining, Tensor | None]:
        """The critic, made now if it was not, and the labels as it takes them."""
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
            f"A critic that heeds classes needs a class (N,) or probabilities (N, K) for each sample, got labels {found}: for other tasks "
            "give the recipe discrepancy=CriticDiscrepancy(by_class=False)."
        )

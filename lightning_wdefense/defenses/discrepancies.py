"""How far the adversarial outputs or features are from the clean ones: ``(clean, adversarial, labels) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.attacks.losses import elementwise_kl, kl_divergence
from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.transport import SinkhornDivergence, SlicedWasserstein, sinkhorn
from lightning_wdefense.transport.kernels.gaussian import squared_mmd

Discrepancy = Callable[[Tensor, Tensor, Any], Tensor] | CriticDiscrepancy


def kl(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))``, the batch mean (TRADES)."""
    return kl_divergence(adversarial, clean).mean()


def weighted_kl(clean: Tensor, adversarial: Tensor, labels: Any) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))``, weighted with the clean input's ``1 - p_y``, the batch mean (MART).

    Of masks each pixel has its own weight, and a sample the sum over its pixels.
    """
    classes = hard_labels(class_labels(labels, clean, check_values=True))
    right = F.softmax(float32_or_better(logits_of(clean)), 1).gather(1, classes.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (elementwise_kl(adversarial, clean) * (1 - right)).where(not_ignored(classes), 0).sum() / len(classes)


def mmd(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """Squared maximum mean discrepancy, with five Gaussian kernels around the batch's mean squared distance (Long et al., 2015).

    Their bandwidths are the mean squared distance between two points of the pooled batch (a constant for the gradient) times 1/4, 1/2,
    1, 2 and 4; the kernels' mean is taken, so that the value lies in [0, 2].
    """
    return squared_mmd(float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial)))


def coral(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """``|cov(clean) - cov(adversarial)|_F^2 / (4 D^2)``: second moments alone (Sun and Saenko, 2016); 0 for a single sample."""
    one, other = float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial))
    return (_covariance(one) - _covariance(other)).square().sum() / (4 * one.shape[1] ** 2)


def _covariance(points: Tensor) -> Tensor:
    centred = points - points.mean(0)
    return centred.T @ centred / max(len(points) - 1, 1)


def paired_l2(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """``mean |clean_i - adversarial_i|^2 / 2``: the transport cost of the coupling that pairs each sample with itself."""
    return (float32_or_better(clean) - float32_or_better(adversarial)).square().sum() / (2 * len(clean))


@dataclass(frozen=True)
class Transport:
    """The Sinkhorn divergence between the clean and the adversarial batch, which uses the labels if it has a label cost.

    Args:
        divergence: the divergence and its settings.
    """

    divergence: SinkhornDivergence = field(default_factory=SinkhornDivergence)

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
        """The divergence of two batches ``(N, ...)``."""
        labels = _classes(labels, len(clean)) if self.divergence.options.label_cost is not None else None
        return self.divergence(_rows(clean), _rows(adversarial), x_labels=labels, y_labels=labels)


@dataclass(frozen=True)
class SlicedTransport:
    """Half the squared sliced Wasserstein distance between the clean and the adversarial batch; for many dimensions, and blind to labels.

    It sees the mean over directions: a translation costs ``1 / D`` of what it costs by transport in ``D`` dimensions.

    Args:
        distance: the distance and its settings.
    """

    distance: SlicedWasserstein = field(default_factory=SlicedWasserstein)

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
        """Half the squared distance of two batches ``(N, ...)``."""
        return 0.5 * self.distance(_rows(clean), _rows(adversarial)).square()


@dataclass(frozen=True)
class ClassTransport:
    """The entropic transport cost between the clean and the adversarial batch, in which mass stays within its class.

    The plan spreads each sample over the samples of its class that are near it on the other side, and the cost is *not* debiased:
    its gradient draws each adversarial sample towards clean ones of its class, its own among them, so that classes contract.
    Pairing (:func:`paired_l2`) and the divergence only ask that a sample, or the batch, stays where it was. It is not zero between
    equal batches. Units are those of the squared features, half of them, as for the others.

    Args:
        relative_blur: of the transport, in units of the typical distance between the two sides.
        relative_label_cost: price of leaving the class, in units of the mean squared distance from the other side's centre.
    """

    relative_blur: float = 0.2
    relative_label_cost: float = 10.0

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any) -> Tensor:
        """The cost of transport between two batches ``(N, ...)`` with the same labels."""
        x, y = float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial))
        labels = _classes(labels, len(clean))
        # At unit scale the label cost is a number, for which nobody has to wait for the device.
        scale = (
            (x.detach() - y.detach().mean(0)).square().sum(1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        )
        cost = sinkhorn(
            x / scale,
            y / scale,
            relative_blur=self.relative_blur,
            label_cost=self.relative_label_cost,
            x_labels=labels,
            y_labels=labels,
        ).value
        return cost * scale.square()


def _classes(labels: Any, samples: int) -> Tensor:
    """Labels as the cost takes them; one floating number a sample is class 0 or 1.

    Raises:
        ValueError: if they do not give each sample a class, or probabilities of the classes.
    """
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.numel() == samples:
        labels = labels.reshape(-1)
        if bool(((labels == 0) | (labels == 1)).all()):
            labels = labels.long()
    floats = isinstance(labels, Tensor) and labels.is_floating_point()
    classes = isinstance(labels, Tensor) and len(labels) == samples and labels.ndim == 1 + floats
    if not classes or (floats and bool(((labels < 0).any(1) | ((labels.float().sum(1) - 1).abs() > 1e-2)).any())):
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"A transport that heeds classes needs a class (N,) or probabilities (N, K) for each of the {samples} samples, got "
            f"labels {found}{' that are no probabilities' * floats}: for other tasks use the discrepancy 'sinkhorn' or "
            "'paired-l2' (recipes 'sat-features', 'alp-features')."
        )
    return labels


def _rows(points: Tensor) -> Tensor:
    return points.reshape(len(points), -1)


LABEL_COST = 100.0
"""Far above the distance between logits of different classes: mass stays within its class."""

DISCREPANCIES: dict[str, Discrepancy] = {
    "kl": kl,
    "weighted-kl": weighted_kl,
    "paired-l2": paired_l2,
    "sinkhorn": Transport(),
    "sinkhorn-label": Transport(SinkhornDivergence(label_cost=LABEL_COST)),
    "class-transport": ClassTransport(),
    "sliced": SlicedTransport(),
    "mmd": mmd,
    "coral": coral,
    "critic": CriticDiscrepancy(),
}


def get_discrepancy(discrepancy: str | Discrepancy) -> Discrepancy:
    """A discrepancy by its name; a :class:`CriticDiscrepancy` and callables ``(clean, adversarial, labels) -> scalar`` pass.

    Raises:
        ValueError: if the name does not exist, with the nearest ones.
    """
    if isinstance(discrepancy, SlicedWasserstein):
        return SlicedTransport(discrepancy)
    if isinstance(discrepancy, CriticDiscrepancy):
        return discrepancy
    if callable(discrepancy):
        return Transport(discrepancy) if isinstance(discrepancy, SinkhornDivergence) else discrepancy
    if discrepancy not in DISCREPANCIES:
        raise ValueError(unknown_name("discrepancy", discrepancy, DISCREPANCIES))
    return DISCREPANCIES[discrepancy]

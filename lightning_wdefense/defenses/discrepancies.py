"""Discrepancies between clean and adversarial outputs or features, as functions ``(clean, adversarial, labels) -> scalar``."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.attacks.losses import elementwise_kl, kl_divergence
from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.transport import SinkhornDivergence, SlicedWasserstein, sinkhorn
from lightning_wdefense.transport.kernels.gaussian import squared_mmd

Discrepancy = CriticDiscrepancy | Callable[[Tensor, Tensor, Any], TensorResult]


def kl(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """Kullback-Leibler divergence ``KL(softmax(clean) || softmax(adversarial))``, the mean over the batch (TRADES).

    Args:
        clean: logits ``(N, K, ...)`` on clean inputs.
        adversarial: logits on adversarial inputs, of the same shape.
        labels: not used.

    References:
        Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> kl(logits, logits)
        tensor(0.)
    """
    return kl_divergence(adversarial, clean).mean()


def weighted_kl(clean: Tensor, adversarial: Tensor, labels: Any) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))``, weighted with ``1 - p_y`` of the clean input; the batch mean (MART).

    For masks each pixel has its own weight, and a sample's value is the sum over its pixels.

    Args:
        clean: logits ``(N, K, ...)`` on clean inputs.
        adversarial: logits on adversarial inputs, of the same shape.
        labels: classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Raises:
        TypeError: if the labels are not a tensor.
        ValueError: if the labels are not classes of the logits.

    References:
        Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> weighted_kl(logits, logits, torch.tensor([0, 1]))
        tensor(0.)
    """
    classes = hard_labels(class_labels(labels, clean, check_values=True))
    right = F.softmax(float32_or_better(logits_of(clean)), 1).gather(1, classes.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (elementwise_kl(adversarial, clean) * (1 - right)).where(not_ignored(classes), 0).sum() / len(classes)


def mmd(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """Squared maximum mean discrepancy (MMD) with the mean of five Gaussian kernels; the value lies in [0, 2].

    The squared bandwidths are 1/4, 1/2, 1, 2 and 4 times the mean squared distance between two points of the pooled batch. This
    distance is a constant for the gradient.

    Args:
        clean: clean outputs or features ``(N, ...)``.
        adversarial: adversarial ones, of the same shape.
        labels: not used.

    References:
        Long et al., "Learning transferable features with deep adaptation networks", ICML 2015.

    Example:
        >>> features = torch.tensor([[0.0], [1.0]])
        >>> mmd(features, features)
        tensor(0.)
    """
    return squared_mmd(float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial)))


def coral(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """CORAL: ``|cov(clean) - cov(adversarial)|_F^2 / (4 D^2)`` with sample covariances; 0 for a single sample.

    Args:
        clean: clean outputs or features ``(N, ...)``, flattened to ``(N, D)``.
        adversarial: adversarial ones, of the same shape.
        labels: not used.

    References:
        Sun and Saenko, "Deep CORAL: correlation alignment for deep domain adaptation", ECCV Workshops 2016.

    Example:
        >>> coral(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))  # variances 2 and 0
        tensor(1.)
    """
    one, other = float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial))
    return (_covariance(one) - _covariance(other)).square().sum() / (4 * one.shape[1] ** 2)


def _covariance(points: Tensor) -> Tensor:
    centred = points - points.mean(0)
    return centred.T @ centred / max(len(points) - 1, 1)


def paired_l2(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """``mean |clean_i - adversarial_i|^2 / 2``: the transport cost of the identity coupling (ALP).

    Args:
        clean: clean outputs or features ``(N, ...)``.
        adversarial: adversarial ones, of the same shape.
        labels: not used.

    References:
        Kannan, Kurakin, Goodfellow, "Adversarial logit pairing", 2018.

    Example:
        >>> paired_l2(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(12.5000)
    """
    return (float32_or_better(clean) - float32_or_better(adversarial)).square().sum() / (2 * len(clean))


@dataclass(frozen=True)
class Transport:
    """The Sinkhorn divergence between the clean and the adversarial batch. With a label cost it uses the labels.

    Args:
        divergence: the divergence and its settings.

    References:
        Bouniot, Audigier, Loesch, "Optimal transport as a defense against adversarial attacks", ICPR 2020.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
        >>> print(f"{Transport()(points, points + 1):.2f}")  # moved by (1, 1): |(1, 1)|^2 / 2
        1.00
    """

    divergence: SinkhornDivergence = field(default_factory=SinkhornDivergence)

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
        """The divergence between two batches ``(N, ...)``."""
        labels = _classes(labels, len(clean)) if self.divergence.options.label_cost is not None else None
        return self.divergence(_rows(clean), _rows(adversarial), x_labels=labels, y_labels=labels)


@dataclass(frozen=True)
class SlicedTransport:
    """Half the squared sliced Wasserstein distance between the clean and the adversarial batch. It does not use labels.

    The value is a mean over directions: a translation in ``D`` dimensions costs ``1 / D`` of its transport cost.

    Args:
        distance: the distance and its settings.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
        >>> print(f"{SlicedTransport()(points, points + 1):.2f}")  # half of the transport cost, 1, in two dimensions
        0.50
    """

    distance: SlicedWasserstein = field(default_factory=SlicedWasserstein)

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
        """Half the squared distance between two batches ``(N, ...)``."""
        return 0.5 * self.distance(_rows(clean), _rows(adversarial)).square()


@dataclass(frozen=True)
class ClassTransport:
    """The entropic transport cost between the clean and the adversarial batch, with transport within each class only.

    The transport plan couples each sample with nearby samples of its class in the other batch. The cost is *not* debiased. Its
    gradient moves each adversarial sample towards clean samples of its class, its own clean input among them, so classes become more
    compact. :func:`paired_l2` and the divergence only keep a sample, or the batch, where it was. The cost between equal batches is
    not zero. Its unit is half the squared unit of the features, as for the other discrepancies.

    Args:
        relative_blur: blur of the transport, in units of the typical distance between the two batches.
        relative_label_cost: cost added between samples of different classes, in units of the mean squared distance of the clean
            samples from the centre of the adversarial ones.

    Example:
        >>> clean, labels = torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1])
        >>> cost, swapped = ClassTransport()(clean, clean + 1, labels), ClassTransport()(clean, clean.flip(0), labels)
        >>> bool(cost < 2), bool(swapped > 40)  # each sample moved by 1, or to the place of the other class
        (True, True)
    """

    relative_blur: float = 0.2
    relative_label_cost: float = 10.0

    def __call__(self, clean: Tensor, adversarial: Tensor, labels: Any) -> Tensor:
        """The transport cost between two batches ``(N, ...)`` with the same labels.

        Args:
            clean: clean outputs or features.
            adversarial: adversarial ones, of the same shape.
            labels: classes ``(N,)`` or class probabilities ``(N, K)``.

        Raises:
            ValueError: if the labels do not give each sample a class.
        """
        x, y = float32_or_better(_rows(clean)), float32_or_better(_rows(adversarial))
        labels = _classes(labels, len(clean))
        # At unit scale the label cost is a constant, so the host need not wait for the device.
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
    """Labels in the form that the label cost needs. One float per sample, 0 or 1, is a binary class.

    Raises:
        ValueError: if they do not give each sample a class or class probabilities.
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
            f"Transport within classes needs a class (N,) or class probabilities (N, K) for each of the {samples} samples, got labels "
            f"{found}{' that are not probabilities' * floats}. For other tasks use the discrepancy 'sinkhorn' or 'paired-l2' "
            "(recipes 'sat-features', 'alp-features')."
        )
    return labels


def _rows(points: Tensor) -> Tensor:
    return points.reshape(len(points), -1)


LABEL_COST = 100.0
"""Label cost of ``"sinkhorn-label"``, in units of ``|x - y|^2 / 2`` of logits. It is far above the cost between classes, so transport
stays within each class."""

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
    """A discrepancy by its name. Objects are returned as discrepancies.

    Args:
        discrepancy: a name in ``DISCREPANCIES``, a :class:`~lightning_wdefense.transport.SinkhornDivergence`, a
            :class:`~lightning_wdefense.transport.SlicedWasserstein`, a :class:`CriticDiscrepancy`, or a callable
            ``(clean, adversarial, labels) -> scalar``, also by its import path, such as ``"my_package.my_discrepancy"``.

    Raises:
        ValueError: if the name does not exist (the message lists the nearest names), or the import path leads to no callable.

    Example:
        >>> get_discrepancy("paired-l2") is paired_l2
        True
    """
    if isinstance(discrepancy, SlicedWasserstein):
        return SlicedTransport(discrepancy)
    if isinstance(discrepancy, CriticDiscrepancy):
        return discrepancy
    if callable(discrepancy):
        return Transport(discrepancy) if isinstance(discrepancy, SinkhornDivergence) else discrepancy
    if discrepancy not in DISCREPANCIES and "." in discrepancy:
        return _imported(discrepancy)
    if discrepancy not in DISCREPANCIES:
        raise ValueError(unknown_name("discrepancy", discrepancy, DISCREPANCIES))
    return DISCREPANCIES[discrepancy]


def _imported(path: str) -> Discrepancy:
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"discrepancy={path!r} is the import path of nothing: {error}.") from error
    if not callable(found) or isinstance(found, type):
        raise ValueError(
            f"discrepancy={path!r} is a {type(found).__name__}, not a function (clean, adversarial, labels) -> scalar: give an object "
            "of a class by class_path: and init_args: in YAML."
        )
    return get_discrepancy(found)

"""How far the adversarial outputs or features are from the clean ones: ``(clean, adversarial, labels) -> scalar``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.losses import kl_divergence
from lightning_wdefense.attacks.outputs import float32_or_better
from lightning_wdefense.transport import SinkhornDivergence

Discrepancy = Callable[[Tensor, Tensor, Any], Tensor]


def kl(clean: Tensor, adversarial: Tensor, labels: Any = None) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))``, the batch mean (TRADES)."""
    return kl_divergence(adversarial, clean).mean()


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
        labels = _classes(labels) if self.divergence.options.label_cost is not None else None
        return self.divergence(_rows(clean), _rows(adversarial), x_labels=labels, y_labels=labels)


def _classes(labels: Tensor) -> Tensor:
    """Labels as the cost takes them; one floating number a sample is the probability of class 1."""
    if labels.is_floating_point() and labels.numel() == len(labels):
        labels = labels.reshape(-1)
        return torch.stack([1 - labels, labels], dim=1)
    return labels


def _rows(points: Tensor) -> Tensor:
    return points.reshape(len(points), -1)


LABEL_COST = 100.0
"""Far above the distance between logits of different classes: mass stays within its class."""

DISCREPANCIES: dict[str, Discrepancy] = {
    "kl": kl,
    "paired-l2": paired_l2,
    "sinkhorn": Transport(),
    "sinkhorn-label": Transport(SinkhornDivergence(label_cost=LABEL_COST)),
}


def get_discrepancy(discrepancy: str | Discrepancy) -> Discrepancy:
    """A discrepancy by its name; callables ``(clean, adversarial, labels) -> scalar`` pass.

    Raises:
        ValueError: if the name does not exist, with the nearest ones.
    """
    if callable(discrepancy):
        return Transport(discrepancy) if isinstance(discrepancy, SinkhornDivergence) else discrepancy
    if discrepancy not in DISCREPANCIES:
        raise ValueError(unknown_name("discrepancy", discrepancy, DISCREPANCIES))
    return DISCREPANCIES[discrepancy]

"""Surrogate losses that an attack maximises; each returns one value per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks.labels import hard_labels, not_ignored
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

LossName = Literal["ce", "kl", "margin"]
AttackLoss = LossName | Callable[[Any, Any], TensorResult]
"""The name of a loss, or a callable ``(outputs, labels) -> per-sample loss`` for tasks other than classification."""


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy with hard or soft labels, ``(N,)``; with dense labels, summed over the elements (pixels) that are not ignored."""
    logits = float32_or_better(logits_of(outputs))
    loss = F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels, reduction="none")
    return _by_sample(loss)


def margin(outputs: Any, labels: Tensor) -> Tensor:
    """Margin loss ``(N,)`` of Carlini and Wagner (2017): the largest wrong logit minus the true class's logit.

    It is positive exactly for misclassified samples.
    """
    logits = float32_or_better(logits_of(outputs))
    classes = hard_labels(labels)
    right = classes.clamp_min(0).unsqueeze(1)
    others = logits.scatter(1, right, -torch.inf).amax(1)
    difference = (others - logits.gather(1, right).squeeze(1)).where(not_ignored(classes), 0)
    return _by_sample(difference)


def kl_divergence(outputs: Any, clean_outputs: Any) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))`` of each sample, ``(N,)``, as in TRADES (Zhang et al., 2019)."""
    return _by_sample(elementwise_kl(outputs, clean_outputs))


def elementwise_kl(outputs: Any, clean_outputs: Any) -> Tensor:
    """:func:`kl_divergence` before the sum over pixels: ``(N, ...)``, without the classes' dimension."""
    adversarial = F.log_softmax(float32_or_better(logits_of(outputs)), 1)
    clean = F.log_softmax(float32_or_better(logits_of(clean_outputs)), 1)
    return F.kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)


def outputs_as_losses(outputs: Any, labels: Any) -> Tensor:
    """The outputs unchanged, for a model that returns per-sample losses ``(N,)``."""
    return outputs  # type: ignore[no-any-return]


def _by_sample(losses: Tensor) -> Tensor:
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def divergence_of(divergence: Callable[[Tensor, Tensor], Tensor], clean: Tensor, adversarial: Tensor) -> Tensor:
    """A divergence between two point clouds ``(N, D)``; NaN instead of an error if a cloud is not finite (training diverged)."""
    try:
        return divergence(clean, adversarial)
    except ValueError:
        if bool(clean.isfinite().all() & adversarial.isfinite().all()):
            raise
        return adversarial.sum() * torch.nan


def check_loss(loss: AttackLoss) -> None:
    """Refuse a loss that is neither callable nor a known name.

    Raises:
        ValueError: for an unknown name; the message lists the most similar ones.
    """
    if not callable(loss) and loss not in get_args(LossName):
        raise ValueError(unknown_name("attack loss", loss, get_args(LossName)))


def check_divergence(divergence: object) -> None:
    """Refuse a divergence between batches that cannot be called; ``None`` stands for the default.

    Raises:
        TypeError: if it is not callable.
    """
    if divergence is not None and not callable(divergence):
        raise TypeError(
            "divergence must be a callable (clean, adversarial) -> scalar, such as SinkhornDivergence(), or None, got "
            f"{divergence!r}."
        )

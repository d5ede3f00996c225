"""Losses that an attack can maximise: each returns one value a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.labels import hard_labels, not_ignored
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

LossName = Literal["ce", "kl", "margin"]
AttackLoss = LossName | Callable[[Any, Any], Tensor]
"""A name, or a callable ``(outputs, labels) -> per-sample loss`` for tasks beyond classification."""


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy with hard or soft labels: ``(N,)``, summed over any further dimensions (pixels that are of a class)."""
    logits = float32_or_better(logits_of(outputs))
    loss = F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels, reduction="none")
    return _by_sample(loss)


def margin(outputs: Any, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini and Wagner, 2017): positive exactly where misclassified."""
    logits = float32_or_better(logits_of(outputs))
    classes = hard_labels(labels)
    right = classes.clamp_min(0).unsqueeze(1)
    others = logits.scatter(1, right, -torch.inf).amax(1)
    difference = (others - logits.gather(1, right).squeeze(1)).where(not_ignored(classes), 0)
    return _by_sample(difference)


def kl_divergence(outputs: Any, clean_outputs: Any) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))`` of each sample, as TRADES has it (Zhang et al., 2019)."""
    return _by_sample(elementwise_kl(outputs, clean_outputs))


def elementwise_kl(outputs: Any, clean_outputs: Any) -> Tensor:
    """:func:`kl_divergence` before the sum over pixels: ``(N, ...)``, without the classes' dimension."""
    adversarial = F.log_softmax(float32_or_better(logits_of(outputs)), 1)
    clean = F.log_softmax(float32_or_better(logits_of(clean_outputs)), 1)
    return F.kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)


def outputs_as_losses(outputs: Any, labels: Any) -> Tensor:
    """Of a model that returns its losses itself."""
    return outputs  # type: ignore[no-any-return]


def _by_sample(losses: Tensor) -> Tensor:
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def divergence_of(divergence: Callable[[Tensor, Tensor], Tensor], clean: Tensor, adversarial: Tensor) -> Tensor:
    """A divergence between two clouds; NaN, and not its error, where a model that diverged has nothing to compare."""
    try:
        return divergence(clean, adversarial)
    except ValueError:
        if bool(clean.isfinite().all() & adversarial.isfinite().all()):
            raise
        return adversarial.sum() * torch.nan


def check_loss(loss: AttackLoss) -> None:
    """Refuse a loss that is neither callable nor a known name.

    Raises:
        ValueError: naming the nearest losses.
    """
    if not callable(loss) and loss not in get_args(LossName):
        raise ValueError(unknown_name("attack loss", loss, get_args(LossName)))


def check_divergence(divergence: object) -> None:
    """Refuse a divergence between batches that cannot be called; ``None`` stands for the default.

    Raises:
        TypeError: saying what it must be.
    """
    if divergence is not None and not callable(divergence):
        raise TypeError(
            "divergence must be a callable (clean, adversarial) -> scalar, such as SinkhornDivergence(), or None, got "
            f"{divergence!r}."
        )

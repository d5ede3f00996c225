"""Losses that an attack can maximise: each returns one value a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.outputs import float32_or_better, hard_labels, logits_of

LossName = Literal["ce", "kl", "margin"]
AttackLoss = LossName | Callable[[Any, Any], Tensor]
"""A name, or a callable ``(outputs, labels) -> per-sample loss`` for tasks beyond classification."""


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy with hard or soft labels: ``(N,)``, summed over any further dimensions (pixels)."""
    logits = float32_or_better(logits_of(outputs))
    loss = F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels, reduction="none")
    return loss.flatten(1).sum(1) if loss.ndim > 1 else loss


def margin(outputs: Any, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini and Wagner, 2017): positive exactly where misclassified."""
    logits = float32_or_better(logits_of(outputs))
    right = hard_labels(labels).unsqueeze(1)
    others = logits.scatter(1, right, -torch.inf).amax(1)
    difference = others - logits.gather(1, right).squeeze(1)
    return difference.flatten(1).sum(1) if difference.ndim > 1 else difference


def kl_divergence(outputs: Any, clean_outputs: Any) -> Tensor:
    """``KL(softmax(clean) || softmax(adversarial))`` of each sample, as TRADES has it (Zhang et al., 2019)."""
    adversarial = F.log_softmax(float32_or_better(logits_of(outputs)), 1)
    clean = F.log_softmax(float32_or_better(logits_of(clean_outputs)), 1)
    return F.kl_div(adversarial, clean, reduction="none", log_target=True).flatten(1).sum(1)


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

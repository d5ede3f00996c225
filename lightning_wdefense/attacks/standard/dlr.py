"""The difference of logits ratio, which no scaling or shift of the logits changes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense.attacks.labels import not_ignored


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The DLR loss: the largest wrong logit minus the true one, divided by the distance from the largest to the third largest.

    It is positive exactly for misclassified samples. With two classes no ratio is possible: the difference itself is
    the loss.

    Args:
        logits: ``(N, K, ...)``, float32 or float64.
        labels: class indices ``(N, ...)``; with dense labels the losses are summed over elements that are not ignored.

    Returns:
        The losses ``(N,)``.
    """
    top, classes = logits.topk(min(3, logits.shape[1]), dim=1)
    right = labels.clamp_min(0)
    other = torch.where(classes[:, 0] == right, top[:, 1], top[:, 0])
    difference = other - logits.gather(1, right.unsqueeze(1)).squeeze(1)
    return _by_sample(difference / (top[:, 0] - top[:, 2] + 1e-12) if top.shape[1] == 3 else difference, labels)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted DLR loss: the target's logit minus the true one, divided by ``z1 - (z3 + z4) / 2`` of the sorted logits.

    With three classes the divisor is ``z1 - z3``, as in :func:`dlr`; with two it is 1.

    Args:
        logits: ``(N, K, ...)``, float32 or float64.
        labels: class indices ``(N, ...)``; with dense labels the losses are summed over elements that are not ignored.
        targets: the classes to aim at, in the shape of ``labels``.

    Returns:
        The losses ``(N,)``.
    """
    pair = logits.gather(1, torch.stack([labels.clamp_min(0), targets], dim=1))
    difference = pair[:, 1] - pair[:, 0]
    if logits.shape[1] > 2:
        top = logits.topk(min(4, logits.shape[1]), dim=1).values
        difference = difference / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)
    return _by_sample(difference, labels)


def _by_sample(losses: Tensor, labels: Tensor) -> Tensor:
    return losses.where(not_ignored(labels), 0).flatten(1).sum(1) if labels.ndim > 1 else losses

"""Decide whether a loss is a classification loss, from its value and its gradient instead of from shapes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.modules.autograd import gradients
from lightning_wdefense.modules.outputs import float32_or_better, has_one_output, logits_of, tensor_of

SAME_LOSS = 1e-3
"""Relative difference up to which two losses count as equal."""

MIN_SHARE = 0.9
"""Smallest share of samples whose loss must decrease in the true class's logit, faster than in all other logits."""


def is_classification(outputs: Any, labels: Any, loss: Tensor) -> bool:
    """Whether this loss is a classification loss of these outputs, as logits, and these labels, as classes.

    It is if it equals their cross-entropy. It also is if it decreases in the logit of the true class, faster than in
    all other logits, and one of these holds:

    - It does not change if a constant is added to all logits of a sample (label smoothing, class weights, focal, margin
      losses).
    - It increases in all other logits (one-versus-rest losses).

    Args:
        outputs: the model's outputs, which the loss was computed from; its autograd graph must exist.
        labels: the labels of the batch.
        loss: the loss of the batch, a scalar.
    """
    try:
        labels = class_labels(labels, outputs, check_values=True)
        values = tensor_of(outputs)
        logits = logits_of(outputs)
    except (TypeError, ValueError):
        return False
    with torch.no_grad():
        target = labels.to(float32_or_better(logits).dtype) if labels.is_floating_point() else labels
        entropy = F.cross_entropy(float32_or_better(logits), target)
    if not bool(loss.isfinite()):  # training diverged: outputs that diverged too belong to this loss
        return not bool(entropy.isfinite())
    same = max(SAME_LOSS, 4 * torch.finfo(values.dtype).eps, 4 * torch.finfo(loss.dtype).eps)
    if abs(float(entropy) - float(loss.detach())) <= same * (1e-6 + abs(float(entropy))):
        return True
    if has_one_output(outputs) or not values.requires_grad:
        return False
    (slope,) = gradients(loss, [values], retain_graph=True)
    if slope is None:
        return False
    rows = float32_or_better(slope).movedim(1, -1).flatten(0, -2)
    classes = hard_labels(labels).flatten()
    size = rows.abs().sum(1)
    seen = (size > 0) & not_ignored(classes)
    if not bool(seen.any()):
        return False
    rows, classes, size = rows[seen], classes[seen], size[seen]
    own = rows.gather(1, classes.unsqueeze(1)).squeeze(1)
    falls = (own < 0) & (rows.argmin(1) == classes)
    invariant = bool((rows.sum(1).abs() <= 10 * same * size).all())
    others = size + own  # the sum of the other logits' slopes, if none of them is negative
    against_the_rest = bool((((rows >= 0).sum(1) == rows.shape[1] - 1) & (others > 0))[falls].all())
    return float(falls.float().mean()) >= MIN_SHARE and (invariant or against_the_rest)

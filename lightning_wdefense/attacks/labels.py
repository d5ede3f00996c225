"""Check the pipeline's labels and convert them to classes of the model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.modules.outputs import has_one_output, logits_of

IGNORED = -100
"""Label (-100) of elements, such as pixels, that are ignored, as in ``torch.nn.functional.cross_entropy``."""

_TASK_HINT = (
    "For another task (regression, several labels per sample) give the attack loss=callable(outputs, labels), which returns one loss "
    'per sample. Use the attack directly, PGD(threat, loss=...)(model, inputs, labels), or in a recipe, Recipe.named("pgd-at", '
    "threat, attack=...). evaluate, worst_case and AutoAttack measure accuracy, so they need classes; RobustnessMonitor can attack the loss of a "
    "LightningModule's own step."
)


def hard_labels(labels: Tensor) -> Tensor:
    """Class indices ``(N, ...)`` of hard labels ``(N, ...)`` or soft labels ``(N, K, ...)``."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def replace_ignore_index(labels: Any, ignore_index: int | None) -> Any:
    """A copy of the labels in which ``ignore_index`` is replaced by :data:`IGNORED`; other objects are returned unchanged."""
    if not isinstance(labels, Tensor):
        return labels
    labels = labels.detach().clone()
    if ignore_index is None:
        return labels
    ignored = labels == ignore_index
    return (labels if labels.is_floating_point() else labels.long()).masked_fill_(ignored, IGNORED)


def not_ignored(labels: Tensor) -> Tensor:
    """Boolean mask of the hard labels that are not :data:`IGNORED`."""
    return labels != IGNORED


def likeliest_wrong(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest wrong classes in order, or all if there are fewer: ``(N, count, ...)`` for labels ``(N, ...)``."""
    others = logits.scatter(1, labels.clamp_min(0).unsqueeze(1), -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def class_labels(labels: Any, outputs: Any, *, check_values: bool = False) -> Tensor:
    """Labels that fit the outputs: class indices ``(N, ...)``, or soft labels in the shape of the logits.

    For a model with a single output per sample the labels are 0 or 1, of any dtype, in shape ``(N, ...)`` or
    ``(N, 1, ...)``. Of dense labels (one per pixel), those equal to :data:`IGNORED` are ignored.

    Args:
        labels: the labels as the pipeline gives them.
        outputs: the model's outputs for the same samples.
        check_values: whether to check the range too. This synchronises with the device, so once per batch is enough.

    Returns:
        The labels: int64 class indices, or floating-point soft labels.

    Raises:
        TypeError: if the labels are not a tensor.
        ValueError: if their shape or range does not fit: regression targets, several labels per sample, or an unknown
            class.
    """
    logits = logits_of(outputs)
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"The labels must be a tensor, got {type(labels).__name__}. Say where the labels are in the batch with labels=."
        )
    n, classes = logits.shape[0], logits.shape[1]
    if has_one_output(outputs) and labels.numel() * 2 == logits.numel():
        labels = labels.reshape(n, *logits.shape[2:])
        if labels.is_floating_point():
            if check_values:
                _check_binary(labels)
            labels = labels.long()
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"Soft labels must have the shape of the logits, {tuple(logits.shape)}, got {tuple(labels.shape)}; class "
                f"indices must be integers (labels.long()). {_TASK_HINT}"
            )
        if check_values and bool(((labels < 0).any()) | ((labels.float().sum(1) - 1).abs() > 1e-2).any()):
            raise ValueError(
                f"Soft labels must be non-negative and sum to 1 over the classes (dimension 1). {_TASK_HINT}"
            )
        return labels
    expected = (n, *logits.shape[2:])
    if labels.shape != expected:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}; for outputs of shape {tuple(logits.shape)} they must be class "
            f"indices of shape {expected}, or soft labels of shape {tuple(logits.shape)}. {_TASK_HINT}"
        )
    labels = labels.long()
    if check_values:
        _check_range(labels, classes)
    return labels


def _check_binary(labels: Tensor) -> None:
    if not bool(((labels == 0) | (labels == 1) | (labels == IGNORED)).all()):
        raise ValueError(
            f"The model has a single output, but its labels, from {float(labels.min()):.4g} to {float(labels.max()):.4g}, are not all 0 or "
            f"1, as labels of a binary classifier must be. Convert labels -1 and 1 with (labels + 1) / 2. {_TASK_HINT}"
        )


def _check_range(labels: Tensor, classes: int) -> None:
    legal = (labels >= 0) & (labels < classes)
    if labels.ndim > 1:
        legal |= labels == IGNORED
    if not bool(legal.all()):
        pixels = (
            f" Elements to ignore have the label {IGNORED}; for another value use ignore_index= of RobustnessMonitor, evaluate, worst_case and "
            "the metrics."
        )
        raise ValueError(
            f"The labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes: labels "
            f"must lie in 0..{classes - 1}.{pixels * (labels.ndim > 1)}"
        )

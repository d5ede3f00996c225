"""What the pipeline calls labels, as classes of the model's outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_wdefense.modules.outputs import has_one_output, logits_of

IGNORED = -100
"""Label of elements (pixels) that belong to no class and count for nothing, as ``torch.nn.functional.cross_entropy`` has it."""

_TASK_HINT = (
    "For another task (regression, several labels a sample) give the attack a loss=callable(outputs, labels) that returns one loss a "
    'sample, and use it by itself, as PGD(threat, loss=...)(model, inputs, labels), or in a recipe, as Recipe.named("pgd-at", '
    "threat, attack=...): what counts classes (RobustnessMonitor, worst_case, AutoAttack) has none to count."
)


def hard_labels(labels: Tensor) -> Tensor:
    """Class indices of hard or soft labels."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def replace_ignore_index(labels: Any, ignore_index: int | None) -> Any:
    """A copy of the labels in which ``ignore_index`` is :data:`IGNORED`."""
    if not isinstance(labels, Tensor):
        return labels
    labels = labels.detach().clone()
    if ignore_index is None:
        return labels
    ignored = labels == ignore_index
    return (labels if labels.is_floating_point() else labels.long()).masked_fill_(ignored, IGNORED)


def not_ignored(labels: Tensor) -> Tensor:
    """Which hard labels are of a class, and not :data:`IGNORED`."""
    return labels != IGNORED


def class_labels(labels: Any, outputs: Any, *, check_values: bool = False) -> Tensor:
    """Labels that fit the outputs: class indices ``(N, ...)``, or soft labels of the logits' own shape.

    Labels of a model with a single output are 0 or 1, of any dtype, ``(N, ...)`` or ``(N, 1, ...)``. Where there is a label for each
    element (pixel), those of :data:`IGNORED` belong to no class.

    Args:
        labels: as the pipeline gives them.
        outputs: the model's outputs for them.
        check_values: check the range too, which waits for the device: once a batch is enough.

    Raises:
        TypeError: if the labels are not a tensor.
        ValueError: if their shape or range does not fit: regression targets, several labels a sample, an illegal class.
    """
    logits = logits_of(outputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"The labels must be a tensor, got {type(labels).__name__}. Name theirs with labels=.")
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
            f"The model has a single output, and the targets, from {float(labels.min()):.4g} to {float(labels.max()):.4g}, are no "
            f"classifier's: those are 0 or 1 (of labels -1 and 1, (labels + 1) / 2). {_TASK_HINT}"
        )


def _check_range(labels: Tensor, classes: int) -> None:
    legal = (labels >= 0) & (labels < classes)
    if labels.ndim > 1:
        legal |= labels == IGNORED
    if not bool(legal.all()):
        pixels = (
            f" Elements that belong to no class have the label {IGNORED}; RobustnessMonitor, worst_case and the metrics take any "
            "other as ignore_index=."
        )
        raise ValueError(
            f"The labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes: labels "
            f"must lie in 0..{classes - 1}.{pixels * (labels.ndim > 1)}"
        )

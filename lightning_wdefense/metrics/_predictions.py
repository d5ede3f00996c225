"""Converts outputs and targets to class indices, and compares them."""

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

IGNORED = 255
"""The label that most segmentation data sets give to pixels without a class."""


def is_correct(preds: Tensor, target: Tensor, name: str = "preds", ignore_index: int | None = None) -> Tensor:
    """Return for each element whether the predicted class is the label.

    Args:
        preds: class indices ``(N, ...)`` (an integer tensor), logits or probabilities ``(N, C, ...)``, or the logits
            of a binary classifier ``(N,)`` or ``(N, 1, ...)``, where positive logits mean class 1.
        target: class indices ``(N, ...)``, soft labels ``(N, C, ...)`` (the class of the largest one), or binary labels
            as floats in [0, 1], ``(N, ...)`` or ``(N, 1, ...)`` (class 1 above 0.5).
        name: name of ``preds`` in error messages.
        ignore_index: the label of elements that are left out; ``None`` for none.

    Returns:
        A boolean tensor ``(N, ...)``. With ``ignore_index``, a flat boolean tensor of the elements that are not left
        out.

    Raises:
        TypeError: If ``preds`` or ``target`` is not a tensor.
        ValueError: If the shapes do not match, a value is NaN, or a label is not a class of ``preds``.

    Example:
        >>> import torch
        >>> is_correct(torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 0]))
        tensor([ True, False])
    """
    classes, num_classes = _predicted_classes(preds, name)
    labels = _target_classes(target, classes.ndim, num_classes, ignore_index)
    if classes.shape != labels.shape:
        raise ValueError(
            f"`{name}` of shape {tuple(preds.shape)} gives predictions of shape {tuple(classes.shape)}, but `target` of"
            f" shape {tuple(target.shape)} gives labels of shape {tuple(labels.shape)}. Pass one prediction for each"
            " label: logits as (N, C, ...) or class indices as (N, ...), with integer labels (N, ...) or float soft"
            " labels (N, C, ...)."
        )
    if ignore_index is not None:
        kept = labels != ignore_index
        return (classes == labels)[kept]
    if (
        labels.ndim > 1
        and num_classes is None
        and bool((labels == IGNORED).any())
        and not bool((classes == IGNORED).any())
    ):
        raise ValueError(
            f"`target` holds the label {IGNORED}, which is never predicted and usually marks pixels without a class: pass"
            f" ignore_index={IGNORED} to leave them out. If it is a class, pass logits as `{name}`, which give the number of classes."
        )
    return classes == labels


def _predicted_classes(preds: Tensor, name: str) -> tuple[Tensor, int | None]:
    """Return the class indices, and the number of classes if ``preds`` has a class dimension (else ``None``)."""
    _check_tensor(preds, name)
    if not preds.is_floating_point():
        return preds.long(), None
    _check_no_nan(preds, name)
    if preds.ndim > 1 and preds.size(1) > 1:
        return preds.argmax(1), preds.size(1)
    if preds.numel() > 1 and preds.min() >= 0 and preds.max() <= 1:
        rank_zero_warn(
            f"`{name}` has a single output per sample, in [0, 1]. It is read as logits, where positive values mean class 1."
            " If these are probabilities, pass the logits or the class indices instead."
        )
    return (preds if preds.ndim == 1 else preds.squeeze(1)).gt(0).long(), 2


def _target_classes(target: Tensor, ndim: int, num_classes: int | None, ignore_index: int | None) -> Tensor:
    """Return integer labels, with ``ndim`` dimensions if the shape of ``target`` allows it."""
    _check_tensor(target, "target")
    has_class_dim = target.ndim == ndim + 1
    if target.is_floating_point():
        _check_no_nan(target, "target")
        if has_class_dim and target.size(1) > 1:
            if num_classes not in (None, target.size(1)):
                raise ValueError(
                    f"`target` holds soft labels over {target.size(1)} classes, but the predictions are over"
                    f" {num_classes}. Pass both over the same classes, in dimension 1."
                )
            return target.argmax(1)
        target = _binary_labels(target, num_classes, ignore_index)
    labels = (target.squeeze(1) if has_class_dim and target.size(1) == 1 else target).long()
    counted = labels if ignore_index is None else labels[labels != ignore_index]
    if counted.numel():
        low, high = (int(bound) for bound in counted.aminmax())
        if low < 0 or (num_classes is not None and high >= num_classes):
            classes = "non-negative" if num_classes is None else f"in 0..{num_classes - 1}, the classes of the logits"
            raise ValueError(
                f"`target` holds labels from {low} to {high}; they should be {classes}. If a label such as -100 or 255"
                " marks elements to leave out, pass it as ignore_index=."
            )
    return labels


def _binary_labels(target: Tensor, num_classes: int | None, ignore_index: int | None) -> Tensor:
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    counted = target[~ignored]
    if num_classes not in (None, 2) or (counted.numel() and (counted.min() < 0 or counted.max() > 1)):
        raise ValueError(
            f"`target` is a float tensor of shape {tuple(target.shape)}, which means binary labels in [0, 1]. Its values"
            " or the number of classes do not fit this. Pass class indices as integers (`target.long()`), or soft labels"
            " as (N, C, ...)."
        )
    classes = (target > 0.5).long()
    return classes if ignore_index is None else classes.masked_fill(ignored, ignore_index)


def _check_tensor(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor of outputs, class indices or labels, got {type(value).__name__}.")
    if value.ndim == 0:
        raise ValueError(f"`{name}` is a single number; it should have a batch dimension. Unsqueeze it to shape (1,).")


def _check_no_nan(value: Tensor, name: str) -> None:
    count = int(torch.isnan(value).sum())
    if count:
        raise ValueError(
            f"`{name}` holds NaN ({count} of {value.numel()} values), so it has no predicted class. Check whether the model"
            " or the attack diverged, or a lower precision overflowed."
        )

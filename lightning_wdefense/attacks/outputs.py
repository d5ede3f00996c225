"""What a classifier returned, as logits and labels that the losses and metrics can rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HINT = (
    "Return logits from forward, name the submodule that does with model=, or, for another task, give the attack a "
    "loss=callable(outputs, labels) that returns one loss a sample."
)


def tensor_of(outputs: Any) -> Tensor:
    """The tensor in a model's outputs: the outputs themselves, or their ``logits`` (attribute or key).

    Raises:
        TypeError: if there is none.
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    elif not isinstance(outputs, Tensor) and hasattr(outputs, "logits"):
        outputs = outputs.logits
    if not isinstance(outputs, Tensor):
        raise TypeError(f"The model's outputs are not logits but a {type(outputs).__name__}. {_HINT}")
    return outputs


def logits_of(outputs: Any) -> Tensor:
    """The logits ``(N, K, ...)`` in a model's outputs.

    Accepted is what :func:`tensor_of` finds a tensor in. A single logit, ``(N,)`` or ``(N, 1, ...)``,
    becomes the two equivalent ones ``[0, z]``, so that softmax gives the sigmoid.

    Raises:
        TypeError: if there is no floating-point tensor of logits in ``outputs``.
    """
    outputs = tensor_of(outputs)
    if not outputs.is_floating_point() or outputs.ndim == 0:
        raise TypeError(
            f"The model's outputs are not logits: {outputs.dtype}, shape {tuple(outputs.shape)}, where a floating-point "
            f"tensor of shape (N, classes) is needed. {_HINT}"
        )
    if outputs.ndim == 1:
        outputs = outputs.unsqueeze(1)
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], dim=1)
    return outputs


def logit_rows(outputs: Any) -> Tensor:
    """Logits as a cloud: one point ``(D,)`` a sample, in float32 or better."""
    return float32_or_better(logits_of(outputs)).flatten(1)


def float32_or_better(values: Tensor) -> Tensor:
    """Half precision is too coarse for a loss; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def predictions(outputs: Any) -> Tensor:
    """Predicted classes of a model's outputs."""
    return logits_of(outputs).argmax(1)


def hard_labels(labels: Tensor) -> Tensor:
    """Class indices of hard or soft labels."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def check_logits(logits: Tensor) -> None:
    """Refuse probabilities: cross-entropy of a softmax's output has vanishing gradients, so attacks would look weak.

    Raises:
        ValueError: if every row is non-negative and sums to one.
    """
    rows = logits.detach().float()
    if bool(((rows >= 0).all()) & ((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "The model's outputs look like probabilities (every row is non-negative and sums to 1), not logits: attacks on "
            f"them fail for want of gradient and would overstate robustness. {_HINT}"
        )


def class_labels(labels: Any, outputs: Any, *, check_values: bool = False) -> Tensor:
    """Labels that fit the outputs: class indices ``(N, ...)``, or soft labels of the logits' own shape.

    Labels of a single-logit model may be 0/1 (or probabilities) of any dtype, ``(N, ...)`` or ``(N, 1, ...)``.

    Args:
        labels: as the pipeline gives them.
        outputs: the model's outputs for them.
        check_values: check the range too, which waits for the device: once a batch is enough.

    Raises:
        TypeError: if the labels are not a tensor.
        ValueError: if their shape or range does not fit.
    """
    logits = logits_of(outputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"The labels must be a tensor, got {type(labels).__name__}. Name theirs with labels=.")
    n, classes = logits.shape[0], logits.shape[1]
    if logits is not outputs and classes == 2 and labels.numel() * 2 == logits.numel():
        labels = labels.reshape(n, *logits.shape[2:])
        if labels.is_floating_point():
            labels = torch.stack([1 - labels, labels], dim=1)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"Soft labels must have the shape of the logits, {tuple(logits.shape)}, got {tuple(labels.shape)}; class "
                "indices must be integers (labels.long()). For regression give the attack a loss=callable."
            )
        if check_values and bool(((labels < 0).any()) | ((labels.float().sum(1) - 1).abs() > 1e-2).any()):
            raise ValueError("Soft labels must be non-negative and sum to 1 over the classes (dimension 1).")
        return labels
    expected = (n, *logits.shape[2:])
    if labels.shape != expected:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}; for outputs of shape {tuple(logits.shape)} they must be class "
            f"indices of shape {expected}, or soft labels of shape {tuple(logits.shape)}."
        )
    labels = labels.long()
    if check_values and bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"The labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes: labels "
            f"must lie in 0..{classes - 1}."
        )
    return labels

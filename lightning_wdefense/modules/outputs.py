"""What a classifier returned, as logits that the losses and metrics can rely on."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_wdefense.modules.activation import activation

MIN_ROWS = 8
"""So many different rows that look like probabilities are evidence; a few logits may look so by chance."""

_LOGITS_HINT = (
    "Return logits from forward (attacks run it in eval mode), say where in the outputs they are with outputs= (a key, position or "
    "callable), or name the submodule that returns them with model=. Where nothing but the "
    'attack reads outputs, as in recipe "pgd-at", its loss=callable(outputs, labels) that returns one loss a sample is given them '
    "as they are."
)


def tensor_of(outputs: Any) -> Tensor:
    """The tensor in a model's outputs: the outputs themselves, or their ``logits`` or ``out`` (attribute or key).

    Raises:
        TypeError: if there is none.
    """
    for name in ("logits", "out") if not isinstance(outputs, Tensor) else ():
        if isinstance(outputs, Mapping) and name in outputs:
            outputs = outputs[name]
            break
        if not isinstance(outputs, Mapping) and hasattr(outputs, name):
            outputs = getattr(outputs, name)
            break
    if not isinstance(outputs, Tensor):
        raise TypeError(f"The model's outputs are not logits but a {type(outputs).__name__}. {_LOGITS_HINT}")
    return outputs


Pick = str | int | Callable[[Any], Any] | None


def output_picker(pick: Pick) -> Callable[[Any], Any] | None:
    """What finds outputs in what a model returns: by key, attribute or position, or by a callable; ``None`` for nothing to find."""
    if pick is None or callable(pick):
        return pick  # type: ignore[return-value]
    return functools.partial(_pick, pick)


class PickedOutputModel:
    """A model whose outputs are picked from what it returns.

    Args:
        model: the model.
        pick: finds the outputs; ``None`` for all of them.
        accepts_partial_batches: whether it may be run on a part of a batch.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], pick: Callable[[Any], Any] | None, *, accepts_partial_batches: bool = True
    ) -> None:
        self._model, self._pick, self.accepts_partial_batches = model, pick, accepts_partial_batches
        self.__self__ = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)

    def __call__(self, inputs: Tensor) -> Any:
        """The picked outputs."""
        outputs = self._model(inputs)
        return outputs if self._pick is None else self._pick(outputs)


def _pick(name: str | int, outputs: Any) -> Any:
    try:
        if isinstance(outputs, (Mapping, tuple, list)) and not (isinstance(name, str) and hasattr(outputs, name)):
            return outputs[name]  # type: ignore[index]
        return getattr(outputs, str(name))
    except (KeyError, IndexError, TypeError, AttributeError):
        there = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        there = f"a {type(outputs).__name__} of {len(outputs)}" if isinstance(outputs, (tuple, list)) else there
        raise ValueError(f"outputs={name!r} leads nowhere in what the model returns: {there}.") from None


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
            f"tensor of shape (N, classes) is needed. {_LOGITS_HINT}"
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


def has_one_output(outputs: Any) -> bool:
    """Whether a model has a single output a sample (or pixel): of a binary classifier, its logit."""
    values = tensor_of(outputs)
    return values.ndim == 1 or values.shape[1] == 1


def predictions(outputs: Any) -> Tensor:
    """Predicted classes of a model's outputs; -1, which is no class, where they are NaN or infinitely large."""
    largest, classes = logits_of(outputs).max(1)  # NaN counts as the largest
    return torch.where(largest < torch.inf, classes, -1)


def check_logits(outputs: Any) -> None:
    """Refuse probabilities: cross-entropy of a softmax's output has vanishing gradients, and a sigmoid's output is never negative.

    The operation that made the outputs decides, where their graph shows it; else :data:`MIN_ROWS` different rows. A single output that
    only looks like a probability is a warning.

    Raises:
        ValueError: for probabilities.
    """
    logits_of(outputs)  # or it says what is wrong
    values = tensor_of(outputs)
    made_by, rows = activation(values), _rows(values.detach().float())
    if not bool(((rows >= 0) & (rows <= 1)).all()):
        return
    if has_one_output(outputs):
        if made_by:
            _refuse(f"its single output ends in a {made_by}")
        if made_by is None and len(rows) >= MIN_ROWS:
            warnings.warn(
                f"The model's single output lies in [0, 1] for all {len(rows)} samples. It is read as a logit, which says class 1 "
                "where it is positive: if it is a probability, return the logit from forward.",
                stacklevel=2,
            )
        return
    rounding = max(1e-3, 4 * torch.finfo(values.dtype).eps)
    if not bool(((rows.sum(1) - 1).abs() < rounding).all()):
        return
    if made_by == "softmax" or len(rows[:1024].unique(dim=0)) >= MIN_ROWS:
        _refuse("every row is non-negative and sums to 1")


def _rows(values: Tensor) -> Tensor:
    """Outputs ``(N, K, ...)`` or ``(N,)`` with one row for each sample, or pixel."""
    return (values.unsqueeze(1) if values.ndim == 1 else values).movedim(1, -1).flatten(0, -2)


def _refuse(evidence: str) -> NoReturn:
    raise ValueError(
        f"The model's outputs look like probabilities ({evidence}), not logits: attacks on them fail for want of gradient, and would "
        f"overstate robustness. {_LOGITS_HINT}"
    )


def warn_of_no_prediction(predicted: Tensor) -> None:
    """Say so if there are samples for which the model predicted nothing."""
    lost = predicted < 0
    if bool(lost.any()):
        warnings.warn(
            f"The model's outputs are NaN or infinite for {int(lost.sum())} of {lost.numel()} predictions, which count as wrong: has "
            "training diverged, or did a precision overflow?",
            stacklevel=2,
        )

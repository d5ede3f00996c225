"""Find the logits in a model's outputs and check them, for losses and metrics."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_wdefense.modules.activation import activation

MIN_ROWS = 8
"""Smallest number of different rows that must look like probabilities; fewer rows may look so by chance."""

_LOGITS_HINT = (
    "Return logits from forward, also in eval mode, in which attacks run the model. Or say where the logits are in the outputs with "
    "outputs= (a key, position or callable), or name the submodule that returns them with model=. If only the attack needs outputs, "
    'as in recipe "pgd-at", you may also give the attack loss=callable(outputs, labels), which gets the outputs unchanged and returns '
    "one loss per sample."
)


def tensor_of(outputs: Any) -> Tensor:
    """The tensor in a model's outputs: the outputs themselves, or their ``logits`` or ``out`` (attribute or key).

    Raises:
        TypeError: if there is no tensor.
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
    """A function that finds the outputs in what a model returns, by key, attribute, position or callable; ``None`` for all of it."""
    if pick is None or callable(pick):
        return pick  # type: ignore[return-value]
    return functools.partial(_pick, pick)


class PickedOutputModel:
    """A model that returns only a part of another model's outputs.

    Args:
        model: the other model.
        pick: finds the outputs in what the model returns; ``None`` for all of it.
        accepts_partial_batches: whether the model may be run on a part of a batch.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], pick: Callable[[Any], Any] | None, *, accepts_partial_batches: bool = True
    ) -> None:
        self._model, self._pick, self.accepts_partial_batches = model, pick, accepts_partial_batches
        self.__self__ = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)

    def __call__(self, inputs: Tensor) -> Any:
        """The picked outputs for inputs in model units."""
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
        raise ValueError(
            f"outputs={name!r} is not in what the model returns: {there}. Give a key, position or callable."
        ) from None


def logits_of(outputs: Any) -> Tensor:
    """The logits ``(N, K, ...)`` in a model's outputs, as found by :func:`tensor_of`.

    A single logit ``z`` per sample, ``(N,)`` or ``(N, 1, ...)``, becomes the two equivalent logits ``[0, z]``, whose
    softmax is the sigmoid of ``z``.

    Raises:
        TypeError: if there is no floating-point tensor of logits in ``outputs``.
    """
    outputs = tensor_of(outputs)
    if not outputs.is_floating_point() or outputs.ndim == 0:
        raise TypeError(
            f"The model's outputs are not logits: {outputs.dtype}, shape {tuple(outputs.shape)}, but a floating-point "
            f"tensor of shape (N, classes) is needed. {_LOGITS_HINT}"
        )
    if outputs.ndim == 1:
        outputs = outputs.unsqueeze(1)
    if outputs.shape[1] == 1:
        return torch.cat([torch.zeros_like(outputs), outputs], dim=1)
    return outputs


def logit_rows(outputs: Any) -> Tensor:
    """Logits as a point cloud ``(N, D)``, one point per sample, in float32 or float64."""
    return float32_or_better(logits_of(outputs)).flatten(1)


def float32_or_better(values: Tensor) -> Tensor:
    """Half precision converted to float32, which a loss needs; float32 and float64 are unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def has_one_output(outputs: Any) -> bool:
    """Whether a model has a single output per sample (or pixel), the logit of a binary classifier."""
    values = tensor_of(outputs)
    return values.ndim == 1 or values.shape[1] == 1


def predictions(outputs: Any) -> Tensor:
    """Predicted classes ``(N, ...)`` of a model's outputs; -1, which is not a class, if the outputs are NaN or infinite."""
    largest, classes = logits_of(outputs).max(1)  # max treats NaN as the largest value
    return torch.where(largest < torch.inf, classes, -1)


def check_logits(outputs: Any) -> None:
    """Refuse probabilities in the place of logits.

    The cross-entropy of a softmax's output has vanishing gradients, and a sigmoid's output is never negative. If the
    autograd graph shows the operation that made the outputs, this operation decides; otherwise :data:`MIN_ROWS`
    different rows must look like probabilities. A single output per sample that only looks like a probability causes a
    warning.

    Raises:
        TypeError: if the outputs are not logits.
        ValueError: if they are probabilities.
    """
    logits_of(outputs)  # raises for anything that is not logits
    values = tensor_of(outputs)
    made_by, rows = activation(values), _rows(values.detach().float())
    if not bool(((rows >= 0) & (rows <= 1)).all()):
        return
    if has_one_output(outputs):
        if made_by:
            _refuse(f"its single output ends in a {made_by}")
        if made_by is None and len(rows) >= MIN_ROWS:
            warnings.warn(
                f"The model's single output lies in [0, 1] for all {len(rows)} samples. It is used as a logit: class 1 is predicted "
                "where it is positive. If it is a probability, return the logit from forward.",
                stacklevel=2,
            )
        return
    if not are_distributions(values):
        return
    if made_by == "softmax" or len(rows[:1024].unique(dim=0)) >= MIN_ROWS:
        _refuse("every row is non-negative and sums to 1")


def are_distributions(values: Tensor) -> bool:
    """Whether every row of outputs ``(N, K, ...)`` is non-negative and sums to 1, up to rounding in their precision."""
    rows = _rows(values.detach().float())
    rounding = max(1e-3, 4 * torch.finfo(values.dtype).eps)
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < rounding).all())


def _rows(values: Tensor) -> Tensor:
    """Outputs ``(N, K, ...)`` or ``(N,)`` as a matrix with one row per sample, or pixel."""
    return (values.unsqueeze(1) if values.ndim == 1 else values).movedim(1, -1).flatten(0, -2)


def _refuse(evidence: str) -> NoReturn:
    raise ValueError(
        f"The model's outputs look like probabilities ({evidence}), not logits: their gradients vanish, so attacks would fail and "
        f"overstate robustness. {_LOGITS_HINT}"
    )


def warn_of_no_prediction(predicted: Tensor) -> None:
    """Warn of predictions of -1, the samples for which the model's outputs were NaN or infinite."""
    lost = predicted < 0
    if bool(lost.any()):
        warnings.warn(
            f"The model's outputs are NaN or infinite for {int(lost.sum())} of {lost.numel()} predictions, which count as wrong. Check "
            "whether training diverged, or the precision overflowed.",
            stacklevel=2,
        )

"""A model as a callable from inputs in model units to logits, which attacks take in the place of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wdefense.modules.activation import activation
from lightning_wdefense.modules.outputs import (
    PickedOutputModel,
    are_distributions,
    float32_or_better,
    has_one_output,
    logits_of,
    tensor_of,
)

Activation = Literal["softmax", "sigmoid"]
"""What turned the logits into probabilities."""


class View(ABC):
    """A model in another way: a callable from inputs ``(N, ...)`` in model units to logits ``(N, K)``.

    Args:
        inner: the view, or the model, that it runs.
    """

    accepts_partial_batches: bool
    """Whether it may be run on a part of a batch, as attacks do once they have fooled the other samples."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        # The module by which attacks find what to isolate.
        self.__self__ = inner if isinstance(inner, nn.Module) else getattr(inner, "__self__", None)
        self.accepts_partial_batches = getattr(inner, "accepts_partial_batches", True)

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)``."""


class Logits(View):
    """The logits of a model, also of one that returns probabilities; always with a graph, if only of zero gradients.

    Args:
        model: from inputs to outputs.
        activation: what made probabilities of its logits, which is undone; ``None`` for a model that returns logits.
    """

    def __init__(self, model: nn.Module | PickedOutputModel, activation: Activation | None = None) -> None:
        super().__init__(model)
        self.activation = activation

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)``."""
        values = float32_or_better(tensor_of(self.inner(inputs.clone())))  # the model may work in place
        if self.activation is not None:
            tiny = torch.finfo(values.dtype).tiny
            log = values.clamp_min(tiny).log()
            values = log if self.activation == "softmax" else log - (1 - values).clamp_min(tiny).log()
        logits = logits_of(values)
        if inputs.requires_grad:
            # An attack refuses a model without gradients; an audit says how it does with gradients of zero.
            logits = logits + 0 * inputs.flatten(1).sum(1, keepdim=True)
        return logits


def activation_of(outputs: Any) -> Activation | None:
    """What turned these outputs into probabilities; ``None`` if they are logits. The autograd graph decides, otherwise the values.

    Args:
        outputs: the model's outputs, with their graph.
    """
    values = tensor_of(outputs)
    rows = float32_or_better(values.detach())
    if not bool(((rows >= 0) & (rows <= 1)).all()):
        return None
    made_by = activation(values)
    if has_one_output(values):
        return "sigmoid" if made_by == "sigmoid" else None
    if are_distributions(values) and (made_by == "softmax" or len(rows.unique(dim=0)) > 1):
        return "softmax"
    return "sigmoid" if made_by == "sigmoid" else None

"""Gradients of users' models with respect to some tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(outputs: Tensor, inputs: Tensor | Sequence[Tensor], weights: Tensor | None = None, **options: Any) -> Any:
    """:func:`torch.autograd.grad`, which touches no other gradient; it returns ``None`` for inputs that the outputs do not depend on.

    Raises:
        RuntimeError: saying what to do, if the model checkpoints its activations in the way that allows ``backward()`` alone.
    """
    try:
        return torch.autograd.grad(outputs, inputs, weights, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "The model checkpoints its activations with use_reentrant=True, through which gradients with respect to the inputs alone "
            "cannot be taken: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False); models of Hugging Face take "
            'gradient_checkpointing_enable({"use_reentrant": False}).'
        ) from error

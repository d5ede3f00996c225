"""Gradients with respect to given tensors only, with a clear error for reentrant checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(outputs: Tensor, inputs: Tensor | Sequence[Tensor], weights: Tensor | None = None, **options: Any) -> Any:
    """:func:`torch.autograd.grad` with ``allow_unused=True``; it does not change any ``.grad``.

    Args:
        outputs: the tensor to differentiate.
        inputs: the tensors to differentiate with respect to.
        weights: weights of the outputs, in their shape; ``None`` for a scalar.
        **options: further arguments of :func:`torch.autograd.grad`.

    Returns:
        One gradient for each input; ``None`` for an input that the outputs do not depend on.

    Raises:
        RuntimeError: if the model checkpoints its activations with ``use_reentrant=True``, which supports
            ``backward()`` only.
    """
    try:
        return torch.autograd.grad(outputs, inputs, weights, allow_unused=True, **options)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "The model checkpoints its activations with use_reentrant=True, which does not support gradients with respect to the inputs "
            "only: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or for a model of Hugging Face "
            'gradient_checkpointing_enable({"use_reentrant": False}).'
        ) from error

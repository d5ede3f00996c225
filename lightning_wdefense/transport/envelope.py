"""Values whose gradient is known: the envelope theorem instead of a graph through the iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """``value`` ``(B,)`` as a function of ``inputs`` ``(B, ...)``, whose gradients are given.

    At the optimum, the derivative of an optimal value is that of the objective with the solution held fixed (Danskin),
    so that nothing of the iterations that found it needs to be kept.
    """
    return _Envelope.apply(value, len(inputs), *inputs, *gradients)


class _Envelope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n_inputs: int, *tensors: Tensor | None) -> Tensor:
        ctx.n_inputs = n_inputs
        ctx.save_for_backward(*tensors[n_inputs:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The Sinkhorn functions have no second derivatives, so they cannot be differentiated with "
                "create_graph=True: the fixed plan would silently count as a constant."
            )
        gradients = (
            None if gradient is None else gradient * grad.view(-1, *(1,) * (gradient.ndim - 1))
            for gradient in ctx.saved_tensors
        )
        return None, None, *gradients, *(None,) * ctx.n_inputs

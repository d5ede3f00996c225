"""Values whose gradients are known, so that no graph has to be kept through what computed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def with_gradients(
    value: Tensor,
    inputs: Sequence[Tensor],
    gradients: Gradients,
    differentiable: Callable[..., Gradients] | None = None,
) -> Tensor:
    """``value`` ``(B,)`` as a function of ``inputs`` ``(B, ...)``, whose gradients are given.

    Args:
        value: the value of each problem.
        inputs: what it depends on.
        gradients: its gradients, ``None`` for an input that needs none.
        differentiable: computes the gradients from the inputs once more, in a way that can be differentiated; only called
            for a backward pass with ``create_graph=True``.
    """
    return _Envelope.apply(value, differentiable, len(inputs), *inputs, *gradients)


class _Envelope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, differentiable: Callable[..., Gradients] | None, n: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.n, ctx.differentiable = n, differentiable
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        if torch.is_grad_enabled():
            if ctx.differentiable is None:
                raise RuntimeError(
                    "This solver has no second derivatives, so it cannot be differentiated with create_graph=True: the "
                    'fixed plan would silently count as a constant. Use solver="native".'
                )
            gradients = ctx.differentiable(*inputs)
        scaled = (
            None if gradient is None else gradient * grad.view(-1, *(1,) * (gradient.ndim - 1))
            for gradient in gradients
        )
        return None, None, None, *scaled, *(None,) * ctx.n

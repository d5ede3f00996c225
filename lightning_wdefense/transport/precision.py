"""Products of float32 matrices with float32 accuracy, whatever reduced precision the user allows for training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()
_users = 0
_allowed: tuple[str, ...] = ()


@contextmanager
def exact_products() -> Iterator[None]:
    """Forbid TF32 and bfloat16 inside the products of float32 matrices: their rounding would swamp the costs.

    The setting is one of the process, so that with several threads the first one in changes it and the last one out puts it
    back.
    """
    global _users, _allowed
    with _lock:
        if _users == 0:
            _allowed = _get()
            if not _is_exact(_allowed):
                _set(tuple(_exact() for _ in _allowed))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and not _is_exact(_allowed):
                _set(_allowed)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of batches ``(1 or B, I, J)`` and ``(1 or B, J, K)``, and all its derivatives, with exact products.

    Autocast is off in them too: a backward pass that is called under autocast would be cast, whatever the forward pass was.
    """
    product: Tensor = _ExactMatmul.apply(left, right)
    return product


class _ExactMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with exact_products(), torch.autocast(left.device.type, enabled=False):
            return left @ right

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        of_left, of_right = ctx.needs_input_grad
        return (
            exact_matmul(grad, right.mT).sum_to_size(left.shape) if of_left else None,
            exact_matmul(left.mT, grad).sum_to_size(right.shape) if of_right else None,
        )


def _backends() -> list[object]:
    """Where PyTorch 2.9 and later keeps the setting; before, there is only the one for all."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _get() -> tuple[str, ...]:
    backends = _backends()
    if not backends:
        return (torch.get_float32_matmul_precision(),)
    return tuple(backend.fp32_precision for backend in backends)  # type: ignore[attr-defined]


def _set(values: tuple[str, ...]) -> None:
    backends = _backends()
    if not backends:
        torch.set_float32_matmul_precision(values[0])
    for backend, value in zip(backends, values, strict=False):
        backend.fp32_precision = value  # type: ignore[attr-defined]


def _exact() -> str:
    return "ieee" if _backends() else "highest"


def _is_exact(values: tuple[str, ...]) -> bool:
    return set(values) <= {"ieee", "highest", "none"}

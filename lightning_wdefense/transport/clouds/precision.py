"""Products of float32 matrices with float32 accuracy, also where the user allows reduced precision for training."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_lock = threading.Lock()
_users = 0
_allowed: _Setting | None = None


@contextmanager
def exact_products() -> Iterator[None]:
    """Forbid TF32 and bfloat16 inside the products of float32 matrices: their rounding would swamp the costs.

    The setting is one of the process, so that with several threads the first one in changes it and the last one out puts it
    back. They wait for each other only while one of these two happens; where nothing reduced is allowed, nothing is changed.
    """
    global _users, _allowed
    with _lock:
        if _users == 0:
            _allowed = _forbid()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _allow(_allowed)


def _after_fork() -> None:
    """Leave to the threads that stayed behind what they were in the middle of."""
    global _lock, _users
    if _users:
        _allow(_allowed)
    _lock, _users = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of batches ``(1 or B, I, J)`` and ``(1 or B, J, K)``, and all its derivatives, with exact products.

    Autocast is off in them too: a backward pass that is called under autocast would be cast otherwise.
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


class _Setting(NamedTuple):
    """Which products may be of reduced precision: PyTorch's one setting for all, and since 2.9 one for each backend."""

    overall: str | None
    backends: tuple[str, ...]


def _backends() -> list[Any]:
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _forbid() -> _Setting | None:
    """Make products exact, and say what :func:`_allow` has to put back: nothing if they are."""
    backends = _backends()
    if backends and all(backend.fp32_precision in ("ieee", "none") for backend in backends):
        return None
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # It does not speak of settings that it cannot express.
        overall = None
    if overall == "highest" and not backends:
        return None
    own = tuple(_own(backend) for backend in backends)
    # In the terms in which it was given: whoever reads it meanwhile in these, as compiled code does, would meet an error else.
    if overall is not None:
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    return _Setting(overall, own)


def _own(backend: Any) -> str:
    """The setting of a backend, "none" if what it shows comes from the one above it, which it then has to go on to follow."""
    seen: str = backend.fp32_precision
    backend.fp32_precision = "none"
    follows = backend.fp32_precision == seen
    backend.fp32_precision = seen
    return "none" if follows else seen


def _allow(setting: _Setting | None) -> None:
    if setting is None:
        return
    if setting.overall is not None:
        torch.set_float32_matmul_precision(setting.overall)
    for backend, value in zip(_backends(), setting.backends, strict=True):
        backend.fp32_precision = value

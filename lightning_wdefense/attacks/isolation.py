"""Run a model for our own purposes and leave no trace: modes, buffers, random state and grad mode are the user's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def isolated(model: Callable[..., Any], device: torch.device, *, evaluation: bool = True) -> Iterator[None]:
    """Everything done inside is undone: each submodule's own mode, the buffers, and the global random state.

    Inside, gradients are enabled even under ``no_grad`` and ``inference_mode`` (clone inference tensors before
    use). Parameter gradients are not touched as long as the body uses :func:`torch.autograd.grad`. All of it is
    restored after an exception as well.

    Args:
        model: an ``nn.Module``, or a method of one; of any other callable only the random state is kept.
        device: where it runs; the random states of the CPU and of this device are kept.
        evaluation: put every submodule into eval mode inside; otherwise leave the modes alone.
    """
    module = module_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_state_kept(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if module is not None:
            stack.enter_context(_buffers_kept(module))
            if evaluation:
                stack.enter_context(_in_eval_mode(module))
        yield


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a callable: itself, or the one whose method it is."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _random_state_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type in ("cpu", "meta"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    # Flags are set one by one: `train()` may be overridden (frozen backbones), and each submodule has its own.
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    kept = [
        (submodule, name, buffer, buffer.detach().clone(), _version(buffer))
        for submodule in module.modules()
        for name, buffer in submodule._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for submodule, name, buffer, value, version in kept:
                submodule._buffers[name] = buffer
                # Only what was written: a copy would spoil graphs that saved the buffer for their backward.
                if version is None or _version(buffer) != version:
                    _restore(buffer, value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _restore(buffer: Tensor, value: Tensor) -> None:
    with torch.inference_mode(buffer.is_inference()):
        buffer.copy_(value)

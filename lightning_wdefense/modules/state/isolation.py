"""Run a user's model without side effects: modes, buffers, random states and grad mode are restored."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_wdefense._locks import locked
from lightning_wdefense.modules.state.module_state import preserved_attributes, preserved_buffers
from lightning_wdefense.modules.state.process_settings import SharedContext


@contextlib.contextmanager
def isolated(model: Callable[..., Any], device: torch.device, *, evaluation: bool = True) -> Iterator[None]:
    """A context after which the state of a model is restored: modes, buffers, tensors in attributes, and the random states.

    Inside, gradients are enabled, even under ``no_grad`` and ``inference_mode`` (clone inference tensors before use).
    Parameter gradients do not change as long as the body uses :func:`torch.autograd.grad`. The state is restored after
    an exception too.

    Restored are the mode of each submodule, the buffers, and the tensors in plain attributes and in lists, tuples,
    dicts and deques there. Tensors that the body adds are removed, so no cache keeps a graph of the body. Values are
    restored for tensors that are attributes themselves, but not for tensors in lists and other containers. Not restored
    are attributes without tensors, such as counters, and the contents of other objects.

    One thread at a time may be inside with a module or one of its submodules; other threads wait. The random states are
    restored when the last thread leaves. Two things are not protected. Another thread that runs the module outside of
    this context finds it in eval mode. Numbers that other threads draw from the global random states in the meantime
    are drawn again.

    Args:
        model: an ``nn.Module``, or a method or ``functools.partial`` of a module; for other callables only the random
            states are restored.
        device: the device of the inputs. The random states of the CPU, of this device, of numpy and of Python are
            restored.
        evaluation: put each submodule into eval mode inside; otherwise leave the modes unchanged.

    Raises:
        RuntimeError: for a deadlock: threads wait for each other's modules.
    """
    module = module_of(model)
    modules = [] if module is None else list(module.modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(modules))
        stack.enter_context(internal_pass())
        for kept in _random_states(device):
            stack.enter_context(kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_fresh_autocast_cache())
        stack.enter_context(preserved_buffers(modules))
        stack.enter_context(preserved_attributes(modules))
        if evaluation:
            stack.enter_context(_in_eval_mode(modules))
        yield


_here = threading.local()


@contextlib.contextmanager
def internal_pass() -> Iterator[None]:
    """Mark this thread's forward passes inside as internal, so that recorders of the user's passes can ignore them."""
    _here.internal_pass_depth = internal_pass_depth() + 1
    try:
        yield
    finally:
        _here.internal_pass_depth -= 1


def internal_pass_depth() -> int:
    """Number of :func:`internal_pass` contexts around the current code; 0 in the user's own step."""
    return getattr(_here, "internal_pass_depth", 0)


def eager() -> contextlib.AbstractContextManager[Any]:
    """A context in which compiled modules run eagerly, so that new hooks run and autograd graphs can be kept.

    The setting belongs to the whole process: compiled modules of other threads run eagerly in the meantime too.
    """
    return _eager()


def _force_eager() -> contextlib.AbstractContextManager[Any]:
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6 and later
    return _uncompiled_frames() if set_stance is None else set_stance("force_eager")


@contextlib.contextmanager
def _uncompiled_frames() -> Iterator[None]:
    """What ``set_stance("force_eager")`` does, for PyTorch 2.4 and 2.5: a call of compiled code turns on no compiler."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing is compiled yet, and importing it takes seconds
        yield
        return
    set_eval_frame = dynamo.set_eval_frame
    dynamo.set_eval_frame = lambda callback: set_eval_frame(None if callable(callback) else callback)
    try:
        yield
    finally:
        dynamo.set_eval_frame = set_eval_frame


_eager = SharedContext(_force_eager)


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module that a callable belongs to: the callable itself, or the module of a method or ``functools.partial``; else ``None``."""
    while isinstance(model, partial):
        model = model.func
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextlib.contextmanager
def _preserved_host_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _preserved_device_state(device: torch.device) -> Iterator[None]:
    generators = getattr(torch, device.type)
    state = generators.get_rng_state(device)
    try:
        yield
    finally:
        generators.set_rng_state(state, device)


_host_state = SharedContext(_preserved_host_state)
_device_states: dict[torch.device, SharedContext] = {}


def _random_states(device: torch.device) -> list[SharedContext]:
    if device.type in ("cpu", "meta"):
        return [_host_state]
    # One context for each device, because threads may use different devices; setdefault is safe if two threads come at once.
    return [_host_state, _device_states.setdefault(device, SharedContext(partial(_preserved_device_state, device)))]


@contextlib.contextmanager
def _fresh_autocast_cache() -> Iterator[None]:
    # Weights that were cast under inference_mode have no gradients; and the user must not get weights that were cast here.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    # Flags are set one by one: `train()` may be overridden (frozen backbones), and each submodule has its own.
    modes = [(submodule, submodule.training) for submodule in modules]
    try:
        for submodule, _ in modes:
            # cuDNN has no backward pass for recurrent layers in eval mode. Without dropout both modes compute the same.
            submodule.training = isinstance(submodule, nn.RNNBase) and submodule.dropout == 0
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training

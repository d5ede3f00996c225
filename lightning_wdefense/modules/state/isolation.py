"""Run a model for our own purposes and leave no trace: modes, buffers, random state and grad mode are the user's."""

from __future__ import annotations

import contextlib
import random
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
    """Everything done inside is undone: each submodule's own mode, the buffers, tensors in plain attributes, and the global random states.

    Inside, gradients are enabled even under ``no_grad`` and ``inference_mode`` (clone inference tensors before
    use). Parameter gradients are not touched as long as the body uses :func:`torch.autograd.grad`. All of it is
    restored after an exception as well.

    Tensors that submodules keep as plain attributes, also in lists, tuples, dicts and deques there, are afterwards those that were there;
    what the body adds is taken away, so that no cache holds one of its graphs. Their values are kept as well, but not those of tensors in
    lists and the like. Attributes without tensors, such as counters, stay as the body left them, and so does what is inside of other objects.

    One thread at a time is inside with a module or a submodule of it; others wait. The random states come back when the last
    thread leaves. What cannot be kept apart is another thread's pass over the module outside of this, which meets it in eval mode, and
    what other threads draw from the global random states meanwhile.

    Args:
        model: an ``nn.Module``, or a method or ``functools.partial`` of one; of any other callable only the random
            states are kept.
        device: where it runs; the random states of the CPU, of this device, of numpy and of Python are kept.
        evaluation: put every submodule into eval mode inside; otherwise leave the modes alone.

    Raises:
        RuntimeError: if the threads that are inside with the module wait for what this one is inside with.
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
    """Marks forward passes made inside, by this thread, as ours, so that whoever watches the user's own passes can tell them apart."""
    _here.internal_pass_depth = internal_pass_depth() + 1
    try:
        yield
    finally:
        _here.internal_pass_depth -= 1


def internal_pass_depth() -> int:
    """How many passes of ours the current code is inside of: 0 in the user's own step."""
    return getattr(_here, "internal_pass_depth", 0)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules eagerly inside: hooks made for the moment are seen, and graphs can be kept.

    PyTorch knows this of the process alone: other threads' compiled modules run eagerly as well meanwhile.
    """
    return _eager()


def _force_eager() -> contextlib.AbstractContextManager[Any]:
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6 and later
    return contextlib.nullcontext() if set_stance is None else set_stance("force_eager")


_eager = SharedContext(_force_eager)


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a callable: itself, or the one whose method (or partial) it is."""
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
    # One for each device, for threads may each have their own; setdefault, for two may come at once.
    return [_host_state, _device_states.setdefault(device, SharedContext(partial(_preserved_device_state, device)))]


@contextlib.contextmanager
def _fresh_autocast_cache() -> Iterator[None]:
    # Weights that were cast under inference_mode cannot be differentiated through, nor the user later with ours.
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
            # cuDNN has no backward for recurrent layers in eval mode; without dropout their modes do the same.
            submodule.training = isinstance(submodule, nn.RNNBase) and submodule.dropout == 0
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training

"""Save the state of a module that its own step may change, and restore it repeatedly."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_wdefense.modules.state.module_state import MAX_ELEMENTS, MODULE_ATTRIBUTES, parts
from lightning_wdefense.modules.state.snapshot import TensorSnapshot, batch_count, restore_written

MAX_PARAMETER_ELEMENTS = 2**26
"""Largest number of elements of all parameters whose values are saved, 256 MiB in float32.

For a larger model only frozen parameters are saved, if they have at most this many elements.
"""

MAX_TENSORS = 1000
"""Largest number of tensors in a container whose values are saved; a longer container probably holds all outputs of an epoch."""

MAX_ENTRIES = 10_000
"""Largest number of entries of a container in an object that is not a module; a longer container is probably a data set."""

_REFILLED = frozenset({list, dict, OrderedDict, defaultdict, deque, set, Counter})
_LEAVES = frozenset({int, float, str, bool, bytes, complex, type(None)})
_LIBRARIES = frozenset(
    {"torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "builtins", "wandb", "lightning_wdefense"}
)
_LOOKED_AFTER = frozenset({"training", "_buffers"})


class StepState:
    """The state of a module and its submodules that a step may change.

    It holds plain attributes (counters, containers, states of metrics, caches, random generators), buffers and
    parameters: a step may update parameters itself, for example those of an averaged model. Restoring an attribute
    refills lists, dicts, sets and deques with their old entries. It restores the values of tensors and arrays with at
    most :data:`MAX_ELEMENTS` elements, and of all tensors of a metric. Metrics and other modules in plain containers,
    such as a teacher in a list, are included. For an object that is not a module its attributes are restored, but not
    the attributes of objects inside it. Effects outside of Python (files) cannot be undone.

    Args:
        module: the user's module.
        buffers: save the buffers too.
    """

    def __init__(self, module: nn.Module, *, buffers: bool = True) -> None:
        self._owners: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._values: list[TensorSnapshot] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._hidden: list[nn.Parameter] = []
        self._buffers = buffers
        self._seen: set[int] = set()
        self._inference: list[tuple[dict[str, Any], str, Tensor]] = []
        for each in module.modules():
            self._keep_module(each)
        self._keep_parameters(list(module.parameters()))
        self._keep_parameters([each for each in self._hidden if id(each) not in self._seen])

    def restore(self) -> None:
        """Restore everything."""
        for container, content in self._containers:
            if not _same(container, content):
                container.clear()
                container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for attributes, found in self._owners:
            for name in attributes.keys() - found.keys() - _LOOKED_AFTER:
                del attributes[name]
            for name, value in found.items():
                if attributes.get(name, self) is not value:
                    attributes[name] = value
        for value, name, before in self._slots:
            if getattr(value, name, self) is not before:
                object.__setattr__(value, name, before)
        restore_written(self._values)
        for array, copy in self._arrays:
            array[...] = copy
        for generator, state in self._generators:
            _set_state(generator, state)

    def usable(self) -> None:
        """Replace inference tensors by copies, because code outside of ``inference_mode`` cannot write to inference tensors."""
        for attributes, name, copy in self._inference:
            attributes[name] = copy.clone()

    def _keep_parameters(self, parameters: list[nn.Parameter]) -> None:
        for kept in (parameters, [each for each in parameters if not each.requires_grad]):
            if any(is_lazy(each) for each in kept):
                return
            if sum(each.numel() for each in kept) <= MAX_PARAMETER_ELEMENTS:
                for each in kept:
                    self._keep_value(each)
                return

    def _keep_module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        attributes = vars(module)
        if self._buffers or isinstance(module, Metric):
            self._keep_statistics(module)
            self._keep_attributes(module._buffers, all_values=isinstance(module, Metric))
        self._keep_attributes(module._modules, inside=False)
        if type(module).__module__.split(".")[0] != "torch":  # modules of torch itself change nothing but buffers
            self._keep_attributes(attributes, all_values=isinstance(module, Metric))

    def _keep_attributes(self, attributes: dict[str, Any], *, all_values: bool = False, inside: bool = True) -> None:
        found = {name: value for name, value in attributes.items() if name not in _LOOKED_AFTER}
        self._owners.append((attributes, found))
        for name, value in found.items() if inside else ():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.is_inference():
                    self._inference.append((attributes, name, value))
                elif value.grad_fn is None and (all_values or value.numel() <= MAX_ELEMENTS):
                    self._keep_value(value)
            elif name[:1] != "_" or name not in MODULE_ATTRIBUTES:
                self._keep(value, deep=True, tensors=not all_values)  # a metric appends to its lists

    def _keep_statistics(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            count = batch_count(module, name)
            if buffer is not None and count is not None and not buffer.is_inference() and not count.is_inference():
                self._keep_value(buffer, count)

    def _keep_value(self, value: Tensor, count: Tensor | None = None) -> None:
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._values.append(TensorSnapshot(value, count))

    def _keep_tensors(self, container: Any) -> None:
        found = [each for each in parts(container) if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]
        found = [each for each in found if not each.is_inference() and each.grad_fn is None]
        if len(found) <= MAX_TENSORS and sum(each.numel() for each in found) <= MAX_PARAMETER_ELEMENTS:
            for each in found:
                self._keep_value(each)

    def _keep(self, value: Any, *, deep: bool, tensors: bool = True) -> None:
        """Save a container, a metric, a random generator or an object, with its contents."""
        kind = type(value)
        if kind in _LEAVES or isinstance(value, (Tensor, type)) or id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            for each in value.modules():
                self._keep_module(each)
            self._hidden += value.parameters()
            return
        if kind in _REFILLED or kind is tuple:
            if not deep and len(value) > MAX_ENTRIES:
                return
            self._seen.add(id(value))
            if kind in _REFILLED:
                self._containers.append((value, value.copy()))
            if tensors:
                self._keep_tensors(value)
            for each in parts(value):
                self._keep(each, deep=deep, tensors=tensors)
        elif isinstance(value, np.ndarray) and value.dtype != object and value.size <= MAX_ELEMENTS:
            self._seen.add(id(value))
            self._arrays.append((value, value.copy()))
        elif isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            self._seen.add(id(value))
            self._generators.append((value, _get_state(value)))
        elif deep and kind.__module__.split(".")[0] not in _LIBRARIES:
            attributes, slots = vars_of(value), _slots_of(value)
            if attributes is None and not slots:
                return
            self._seen.add(id(value))
            if attributes is not None:
                self._owners.append((attributes, dict(attributes)))
            self._slots += [(value, name, each) for name, each in slots.items()]
            for each in [*(attributes or {}).values(), *slots.values()]:
                if isinstance(each, Tensor) and not each.is_inference() and each.grad_fn is None:
                    if each.numel() <= MAX_ELEMENTS:
                        self._keep_value(each)
                else:
                    self._keep(each, deep=False)


def vars_of(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object; ``None`` if it has none."""
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _slots_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that are stored in slots."""
    found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in found for name in ([each] if isinstance(each, str) else each)]
    return {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}


def iterators_of(module: nn.Module) -> dict[str, str]:
    """Names and types of attributes that are iterators, such as ``iter(loader)``, which reading consumes."""
    return {
        f"{name}.{key}" if name else key: type(value).__name__
        for name, each in module.named_modules()
        for key, value in vars(each).items()
        if isinstance(value, Iterator)
    }


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return bool(container == content)
    if isinstance(container, dict):
        return list(container) == list(content) and all(container[key] is value for key, value in content.items())
    return all(one is other for one, other in zip(container, content, strict=True))


def _get_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)

"""What a user's own step may change in its module besides modes and flags, put back as often as wanted."""

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
"""Elements of all parameters together, 256 MiB of float32, whose values are kept; of larger models those of frozen ones, if they are no more."""

MAX_TENSORS = 1000
"""Tensors in one container whose values are kept, such as an average of the parameters; a longer one is all outputs of an epoch."""

MAX_ENTRIES = 10_000
"""Entries of a container in an object that is no module; a longer one is a data set."""

_REFILLED = frozenset({list, dict, OrderedDict, defaultdict, deque, set, Counter})
_LEAVES = frozenset({int, float, str, bool, bytes, complex, type(None)})
_LIBRARIES = frozenset(
    {"torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "builtins", "wandb", "lightning_wdefense"}
)
_LOOKED_AFTER = frozenset({"training", "_buffers"})


class StepState:
    """The plain attributes of a module and its submodules: counters, containers, metrics' states, caches, generators; buffers; parameters.

    A step may move parameters itself, as those of an average of the model. Attributes are put back as they were: lists, dicts, sets and
    deques filled with what was in them, tensors and arrays given their values (of at most :data:`MAX_ELEMENTS` elements, but all of a
    metric's). Metrics and other modules are found also in plain containers, where some hide a teacher. Of an object that is no module (an
    average that the step updates) the attributes are kept; what is deeper inside, and what lies outside of Python (files), is not.

    Args:
        module: the user's.
        buffers: also keep the buffers.
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
        """Put everything back."""
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
        """Put copies in place of inference tensors, which code outside of ``inference_mode`` cannot write to."""
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
        if type(module).__module__.split(".")[0] != "torch":  # whose own change nothing but buffers
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
        """Take note of a container, a metric, a generator or an object, and of what is in it."""
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
    """The attributes of a plain object; ``None`` of what has none of its own."""
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _slots_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that has them in slots."""
    found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in found for name in ([each] if isinstance(each, str) else each)]
    return {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}


def iterators_of(module: nn.Module) -> dict[str, str]:
    """Plain attributes that are consumed by being read, such as ``iter(loader)``, by name, with their types."""
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

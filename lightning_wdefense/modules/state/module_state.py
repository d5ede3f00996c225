"""Restore the buffers of a module and the tensors in its plain attributes, which a forward pass may change."""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_wdefense.modules.state.snapshot import TensorSnapshot, batch_count, restore_written

Keep = Callable[..., Tensor]

MAX_ELEMENTS = 2**22
"""Largest number of elements of an attribute whose values are saved; a larger tensor is probably data, not state."""

_ABSENT = object()
_REFILLED = frozenset({list, dict, OrderedDict, defaultdict, deque})
_INTERESTING = (Tensor, list, tuple, dict, deque)
_LEAVES = frozenset({int, float, str, bool, type(None)})
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that every module has: restored elsewhere, like parameters and the mode, or without tensors."""


@contextlib.contextmanager
def preserved_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A context after which the buffers and their values are restored."""
    owners = [(submodule, submodule._buffers, dict(submodule._buffers)) for submodule in modules]
    with _preserved_values() as keep:
        try:
            for submodule, buffers, found in owners:
                for name, buffer in found.items():
                    if buffer is not None:
                        _put(buffers, name, keep(buffer, batch_count(submodule, name)))
            yield
        finally:
            for _, buffers, found in owners:
                for name in set(buffers.keys()) - set(found):
                    del buffers[name]
                for name, buffer in found.items():
                    buffers[name] = buffer


@contextlib.contextmanager
def preserved_attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A context after which the tensors in plain attributes, and in lists, tuples, dicts and deques there, are restored.

    Examples are caches, and the weights that ``nn.utils.weight_norm`` and ``spectral_norm`` compute. Values are
    restored for attributes that are tensors themselves, with at most :data:`MAX_ELEMENTS` elements. Tensors inside
    other objects, and attributes without tensors, are not restored.
    """
    owners = [(vars(submodule), _own(vars(submodule))) for submodule in modules]
    values = [value for _, found in owners for value in found.values()]
    containers = [(each, each.copy()) for each in _inside(values) if type(each) in _REFILLED]
    with _preserved_values() as keep, _preserved_parametrization_cache(modules):
        try:
            for attributes, found in owners:
                for name, value in found.items():
                    # Values of tensors in containers are not saved: they may be all outputs of an epoch.
                    small = isinstance(value, Tensor) and (value.numel() <= MAX_ELEMENTS or value.is_inference())
                    _put(attributes, name, keep(value) if small else value)
            yield
        finally:
            for container, found in containers:
                if not _same(container, found) and _holds_tensors(container, found):
                    container.clear()
                    container.extend(found) if isinstance(found, (list, deque)) else container.update(found)
            for attributes, found in owners:
                now = _own(attributes)
                if _same(now, found):
                    continue
                for name in now.keys() | found.keys():
                    before, after = found.get(name, _ABSENT), now.get(name, _ABSENT)
                    if before is after or not _holds_tensors(before, after):
                        continue
                    if before is _ABSENT:
                        del attributes[name]
                    else:
                        attributes[name] = before


@contextlib.contextmanager
def _preserved_values() -> Iterator[Keep]:
    """Yield a function that saves the value of a leaf tensor until the end; it returns the tensor, or a copy of an inference tensor."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    kept: list[TensorSnapshot] = []

    def keep(tensor: Tensor, count: Tensor | None = None) -> Tensor:
        if id(tensor) not in copies and tensor.grad_fn is None and not isinstance(tensor, nn.Parameter):
            inference = tensor.is_inference()
            if not inference:
                kept.append(TensorSnapshot(tensor, None if count is None or count.is_inference() else count))
            copies[id(tensor)] = tensor, tensor.detach().clone() if inference else tensor
        return copies.get(id(tensor), (tensor, tensor))[1]

    try:
        yield keep
    finally:
        restore_written(kept)


@contextlib.contextmanager
def _preserved_parametrization_cache(modules: Sequence[nn.Module]) -> Iterator[None]:
    # Under parametrize.cached() weights are cached. The user must not train with weights from the attack, nor the attack use the user's.
    ids = {id(submodule) for submodule in modules}

    def take() -> dict[Any, Any]:
        found = parametrize._cache  # a new dict after each cached() block of the user
        return {key: found.pop(key) for key in list(found) if key[0] in ids}

    before = take()
    try:
        yield
    finally:
        take()
        if parametrize._cache_enabled:
            parametrize._cache.update(before)


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in MODULE_ATTRIBUTES}


def _inside(values: Iterable[Any]) -> Iterator[Any]:
    """The tensors and containers among these values, at any depth."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if type(value) in _LEAVES or not isinstance(value, _INTERESTING) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if not isinstance(value, Tensor):
            waiting.extend(parts(value))


def _holds_tensors(*values: Any) -> bool:
    return any(isinstance(each, Tensor) for each in _inside(values))


def parts(container: Any) -> Iterable[Any]:
    """The elements of a list, tuple, dict or similar container."""
    return container.values() if isinstance(container, dict) else container


def _same(container: Any, other: Any) -> bool:
    return len(container) == len(other) and all(map(operator.is_, parts(container), parts(other)))


def _put(container: Any, key: Any, value: Any) -> None:
    if container[key] is not value:
        container[key] = value

"""What a forward pass may change in a module besides its parameters and modes: buffers, and tensors in plain attributes."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Keep = Callable[[Tensor], Tensor]

_ABSENT = object()
_CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, deque})
_OF_EVERY_MODULE = frozenset(
    vars(nn.Module())
)  # looked after elsewhere, as parameters and mode are, or without tensors


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """The buffers and their values are afterwards as they were."""
    owners = [(submodule._buffers, dict(submodule._buffers)) for submodule in module.modules()]
    with _values_kept() as keep:
        try:
            for buffers, found in owners:
                for name, buffer in found.items():
                    _put(buffers, name, buffer if buffer is None else keep(buffer))
            yield
        finally:
            for buffers, found in owners:
                for name in set(buffers.keys()) - set(found):
                    del buffers[name]
                for name, buffer in found.items():
                    buffers[name] = buffer


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Tensors in plain attributes, also in lists, tuples, dicts and deques there, are afterwards those that were there, with their values.

    Such are the weights that ``nn.utils.weight_norm`` and ``spectral_norm`` compute, and caches. Tensors inside of other objects, and
    attributes without tensors, are left alone.
    """
    owners = [(vars(submodule), _own(vars(submodule))) for submodule in module.modules()]
    seen: set[int] = set()
    values = [value for _, found in owners for value in found.values()]
    containers = [(each, each.copy()) for value in values for each in _inside(value, seen) if type(each) in _CONTAINERS]
    with _values_kept() as keep, _cached_parametrizations_kept(module):
        try:
            for container, found in [*containers, *owners]:
                for key, value in _items(found):
                    _put(container, key, _stand_in(value, keep))
            yield
        finally:
            for container, found in containers:
                if not _same(container, found) and (_holds_tensors(container) or _holds_tensors(found)):
                    container.clear()
                    container.extend(found) if isinstance(found, (list, deque)) else container.update(found)
            for attributes, found in owners:
                now = _own(attributes)
                for name in now.keys() | found.keys():
                    before, after = found.get(name, _ABSENT), now.get(name, _ABSENT)
                    if before is after or not (_holds_tensors(before) or _holds_tensors(after)):
                        continue
                    if before is _ABSENT:
                        del attributes[name]
                    else:
                        attributes[name] = before


@contextlib.contextmanager
def _values_kept() -> Iterator[Keep]:
    """Yields what takes note of a tensor, and returns it, or a copy if no graph may save it."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    kept: list[tuple[Tensor, Tensor, int, bool]] = []

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies and not isinstance(tensor, nn.Parameter):
            value = tensor.detach().clone()
            if not tensor.is_inference():
                kept.append((tensor, value, tensor._version, tensor.requires_grad))
            copies[id(tensor)] = tensor, value if tensor.is_inference() else tensor
        return copies.get(id(tensor), (tensor, tensor))[1]

    try:
        yield keep
    finally:
        with torch.no_grad():
            for tensor, value, version, required in kept:
                # Only what was written: a copy would spoil graphs that saved the tensor for their backward.
                if tensor._version != version:
                    if tensor.requires_grad and not required and not tensor._is_view():
                        tensor.detach_()  # what was written had a graph
                    tensor.copy_(value)


@contextlib.contextmanager
def _cached_parametrizations_kept(module: nn.Module) -> Iterator[None]:
    # Under parametrize.cached() the user would train with weights that were computed without a graph, and we with theirs.
    modules = {id(submodule) for submodule in module.modules()}

    def take() -> dict[Any, Any]:
        found = parametrize._cache  # another one after each cached() of the user's
        return {key: found.pop(key) for key in list(found) if key[0] in modules}

    before = take()
    try:
        yield
    finally:
        take()
        if parametrize._cache_enabled:
            parametrize._cache.update(before)


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}


def _inside(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The value and all in it that is a tensor or a container."""
    seen = set() if seen is None else seen
    nested = type(value) in _CONTAINERS or isinstance(value, tuple)
    if id(value) in seen or not (nested or isinstance(value, Tensor)):
        return
    seen.add(id(value))
    yield value
    if nested:
        for _, each in _items(value):
            yield from _inside(each, seen)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in _inside(value))


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, dict) else enumerate(container)


def _same(container: Any, other: Any) -> bool:
    return len(container) == len(other) and all(
        key == key_ and value is value_
        for (key, value), (key_, value_) in zip(_items(container), _items(other), strict=True)
    )


def _stand_in(value: Any, keep: Keep) -> Any:
    if isinstance(value, Tensor):
        return keep(value)
    if type(value) is tuple and _holds_tensors(value):
        parts = tuple(_stand_in(each, keep) for each in value)
        return value if _same(parts, value) else parts
    return value


def _put(container: Any, key: Any, value: Any) -> None:
    if container[key] is not value:
        container[key] = value

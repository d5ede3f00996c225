"""Find values in the nested batches of a dataloader by path, and replace them in a copy."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[int | str, ...]

MAX_SHOWN = 20
"""Largest number of tensors that a message lists."""


def as_key(key: Any) -> Any:
    """A path as a tuple, whatever sequence it is: YAML has no tuples, and OmegaConf has sequences of its own. Other keys as they are."""
    return tuple(key) if isinstance(key, Sequence) and not isinstance(key, str) else key


def field_names(batch: Any) -> list[Any]:
    """The keys of a mapping, the fields of a named tuple, or the public attributes of an object."""
    if isinstance(batch, Mapping):
        return list(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return list(batch._fields)
    if isinstance(batch, (tuple, list, Tensor)):
        return []
    slots = [name for cls in reversed(type(batch).__mro__) for name in getattr(cls, "__slots__", ())]
    return [name for name in dict.fromkeys((*slots, *getattr(batch, "__dict__", ()))) if str(name)[:1] != "_"]


def has_field(batch: Any, key: int | str) -> bool:
    """Whether a batch has this key, position or attribute."""
    if isinstance(batch, (tuple, list)) and isinstance(key, int):
        return -len(batch) <= key < len(batch)
    return key in field_names(batch) or (isinstance(key, str) and isinstance(getattr(type(batch), key, None), property))


def get_field(batch: Any, key: int | str) -> Any:
    """The value at a key, position or attribute."""
    if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and isinstance(key, int)):
        return batch[key]  # type: ignore[index]
    return getattr(batch, str(key))


def resolve(batch: Any, key: int | str | tuple[Any, ...]) -> Path | None:
    """The path for a key, a dotted string or a tuple of keys in this batch; ``None`` if there is none."""
    if isinstance(key, tuple):
        path: Path = ()
        for each in key:
            found = resolve(value_at(batch, path), each)
            if found is None:
                return None
            path += found
        return path
    if has_field(batch, key):
        return (key,)
    if isinstance(key, str):
        if isinstance(batch, (tuple, list)) and key.lstrip("-").isdigit():
            return resolve(batch, int(key))
        if isinstance(batch, Mapping) and key.lstrip("-").isdigit() and int(key) in batch:
            return (int(key),)
        for end in range(len(key) - 1, 0, -1):  # the longest name first, because names may contain dots
            if key[end] == "." and (head := resolve(batch, key[:end])) is not None:
                rest = resolve(value_at(batch, head), key[end + 1 :])
                if rest is not None:
                    return head + rest
    return None


def value_at(batch: Any, path: Path) -> Any:
    """The value at a path."""
    for key in path:
        batch = get_field(batch, key)
    return batch


def with_value_at(batch: Any, path: Path, value: Any) -> Any:
    """The same batch with another value at a path. Only the containers along the path are copied."""
    if not path:
        return value
    key, value = path[0], with_value_at(get_field(batch, path[0]), path[1:], value)
    if isinstance(batch, tuple):
        items = list(batch)
        items[key if isinstance(key, int) else batch._fields.index(key)] = value  # type: ignore[attr-defined]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    before = get_field(batch, key)
    changed = copy.copy(batch)
    _set(changed, key, value)
    if get_field(batch, key) is not before:  # the copy shares the container of its values
        _set(batch, key, before)
        _set(changed := copy.deepcopy(batch), key, value)
    return changed


def _set(batch: Any, key: int | str, value: Any) -> None:
    if isinstance(batch, (list, Mapping)):
        batch[key] = value  # type: ignore[index]
    else:
        try:
            object.__setattr__(batch, str(key), value)  # also where the dataclass is frozen
        except AttributeError:  # a property with a setter of its own
            setattr(batch, str(key), value)


def tensor_paths(batch: Any) -> list[Path]:
    """The paths of all tensors in a batch."""
    return [path for path, _ in _walk(batch, (), set())]


def path_text(path: Path) -> str:
    """A path as users write it: a position, a dotted string, or else a tuple."""
    if len(path) == 1:
        return repr(path[0])
    if all(isinstance(key, int) for key in path) or any("." in str(key) for key in path):
        return repr(path)
    return repr(".".join(map(str, path)))


def tensors_text(batch: Any) -> str:
    """A list of the tensors in a batch, with path, shape and dtype, for a message."""
    found = [(path_text(path), value) for path, value in _walk(batch, (), set()) if path]
    shown = [
        f"{path} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for path, value in found[:MAX_SHOWN]
    ]
    return ", ".join(shown) + ", ..." * (len(found) > MAX_SHOWN)


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same batch with a function applied to each tensor in it; parts without tensors are not copied.

    Args:
        batch: tensors in tuples, lists, mappings, and objects with attributes, at any depth.
        function: the function of a tensor.
    """
    for path in tensor_paths(batch):
        value = value_at(batch, path)
        changed = function(value)
        if changed is not value:
            batch = with_value_at(batch, path, changed)
    return batch


def _walk(value: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, (str, bytes, int, float, type, nn.Module, types.FunctionType, types.MethodType, type(None))):
        return
    if isinstance(value, (torch.dtype, torch.device)) or id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        for index, each in enumerate(value):
            yield from _walk(each, (*path, index), seen)
        return
    for name in field_names(value):
        if has_field(value, name):
            try:
                each = get_field(value, name)
            except (AttributeError, KeyError):  # a slot that is empty
                continue
            yield from _walk(each, (*path, name), seen)

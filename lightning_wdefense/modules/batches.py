"""Find inputs and labels in whatever a dataloader yields, and put other inputs in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Key = int | str | None
Inputs = Any
Labels = Any

INPUT_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")


class Batches:
    """Reads batches that are tuples, lists, mappings, or objects with attributes.

    Args:
        inputs: key, position or attribute of the inputs; ``None`` for a usual name or else, in tuples and lists, position 0.
        labels: the same for the labels; ``None`` for a usual name or position 1.
    """

    def __init__(self, inputs: Key = None, labels: Key = None) -> None:
        self._inputs, self._labels = inputs, labels

    def read(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs and labels of a batch.

        Raises:
            TypeError: if the inputs are not a tensor.
            ValueError: if they are not found; lists what is there.
        """
        inputs = _get(batch, self._key(batch, "inputs"))
        labels = _get(batch, self._key(batch, "labels"))
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"The inputs of the batch are a {type(inputs).__name__}, not a tensor. Name theirs with inputs=."
            )
        return inputs, labels

    def inputs(self, batch):
        return [_get(batch, self._key(batch, "inputs"))]

    def labels_or_none(self, batch):
        try:
            return self.read(batch)[1]
        except (ValueError, TypeError):
            return None

    def replace(self, batch: Any, inputs: Tensor) -> Any:
        """The same batch with other inputs; the given one is not changed."""
        if isinstance(inputs, list):
            (inputs,) = inputs
        key = self._key(batch, "inputs")
        if isinstance(batch, tuple):
            items = list(batch)
            items[key if isinstance(key, int) else batch._fields.index(key)] = inputs  # type: ignore[attr-defined]
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
        before = _get(batch, key)
        changed = copy.copy(batch)
        _set(changed, key, inputs)
        if _get(batch, key) is not before:  # the copy shares what holds its values
            _set(batch, key, before)
            _set(changed := copy.deepcopy(batch), key, inputs)
        return changed

    def _key(self, batch: Any, role: str) -> int | str:
        key = getattr(self, "_" + role)
        names = _names(batch)
        if key is not None:
            if _has(batch, key):
                return key
            raise ValueError(f"{role}={key!r} names nothing in the batch, {_describe(batch, names)}.")
        position, usual = (0, INPUT_KEYS) if role == "inputs" else (1, LABEL_KEYS)
        for name in usual:
            if name in names:
                return name
        if isinstance(batch, (tuple, list)) and len(batch) > position:
            return position
        raise ValueError(
            f"No {role} were recognised in the batch, {_describe(batch, names)}: name theirs with {role}=. Known by "
            f"convention: position {position} of a tuple or list, or {', '.join(usual)}."
        )


def _names(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return list(batch._fields)
    if isinstance(batch, (tuple, list, Tensor)):
        return []
    slots = [name for cls in reversed(type(batch).__mro__) for name in getattr(cls, "__slots__", ())]
    return [name for name in dict.fromkeys((*slots, *getattr(batch, "__dict__", ()))) if name[:1] != "_"]


def _has(batch: Any, key: int | str) -> bool:
    if isinstance(batch, (tuple, list)) and isinstance(key, int):
        return -len(batch) <= key < len(batch)
    return key in _names(batch)


def _get(batch: Any, key: int | str) -> Any:
    if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and isinstance(key, int)):
        return batch[key]  # type: ignore[index]
    return getattr(batch, str(key))


def _set(batch: Any, key: int | str, value: Any) -> None:
    if isinstance(batch, (list, Mapping)):
        batch[key] = value  # type: ignore[index]
    else:
        object.__setattr__(batch, str(key), value)  # also where the dataclass is frozen


def _describe(batch: Any, names: list[Any]) -> str:
    if isinstance(batch, Tensor):
        return f"which is one tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)) and not names:
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(_brief(item) for item in batch)})"
    return f"a {type(batch).__name__} with {', '.join(map(repr, names)) or 'nothing in it'}"


def _brief(item: Any) -> str:
    return f"tensor {tuple(item.shape)}" if torch.is_tensor(item) else type(item).__name__


def map_tensors(batch: Any, function: Any) -> Any:
    """Temporary."""
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(batch, Tensor, function)

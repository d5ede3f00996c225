"""Find inputs and labels in a dataloader's batches, and replace the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_wdefense.modules.paths import (
    Path,
    as_key,
    field_names,
    get_field,
    resolve,
    tensor_paths,
    tensors_text,
    value_at,
    with_value_at,
)

Key = int | str | tuple[int | str, ...] | None
"""A position, key or attribute, or a path to it: ``"image.pixels"``, ``(0, 1)``."""

Inputs = int | str | list[int | str | tuple[int | str, ...]] | tuple[int | str, ...] | Callable[..., Any] | None
"""A key or path, a list of several, or a callable that returns the inputs, ``f(batch)``, and replaces them, ``f(batch, inputs)``."""

Labels = Key | Callable[[Any], Any]
"""A key or path, or a callable that returns the labels, ``f(batch)``."""

INPUT_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")


class BatchReader:
    """Finds inputs and labels in batches: tuples, lists, mappings, or objects with attributes, at any depth.

    With ``inputs=None`` the inputs are found by these rules, in this order:

    - A batch that is a tensor is its own input.
    - The value under a usual name, see ``INPUT_KEYS``.
    - In a list or mapping of batches, as from ``CombinedLoader``: the inputs of each batch.
    - Position 0 of a tuple or list.
    - In a mapping or object without a usual name: the only floating-point tensor with two or more dimensions.

    If the value found is a container of similar tensors (views, images), all of them are inputs. Otherwise the same
    rules are applied to this container.

    Args:
        inputs: where the inputs are; ``None`` for the rules above.
        labels: where the labels are; ``None`` for a usual name, see ``LABEL_KEYS``, or position 1.
    """

    def __init__(self, inputs: Inputs = None, labels: Labels = None) -> None:
        self._labels = as_key(labels)
        several = isinstance(inputs, Sequence) and not isinstance(inputs, (str, tuple))
        self._inputs = [as_key(each) for each in inputs] if several else as_key(inputs)  # type: ignore[union-attr]

    def read(self, batch: Any) -> tuple[Tensor, Any]:
        """Inputs and labels of a batch with a single tensor of inputs.

        Raises:
            TypeError: if the inputs are not a tensor.
            ValueError: if they are not found, or there are several; the message lists the batch's tensors.
        """
        found, labels = self.inputs(batch), self.labels(batch)
        if len(found) != 1:
            raise ValueError(
                f"The batch, {_describe(batch)}, has {len(found)} tensors of inputs, but one is needed: name it with inputs=."
            )
        return found[0], labels

    def inputs(self, batch: Any) -> list[Tensor]:
        """All tensors of inputs, in the order of the batch.

        Raises:
            TypeError: if something found is not a tensor.
            ValueError: if nothing is found; the message lists the batch's tensors.
        """
        if callable(self._inputs):
            found = self._inputs(batch)
            found = list(found) if isinstance(found, (list, tuple)) else [found]
        else:
            found = [value_at(batch, path) for path in self._paths(batch)]
        for each in found:
            if not isinstance(each, Tensor):
                raise TypeError(
                    f"The inputs of the batch are a {type(each).__name__}, not a tensor: say where the inputs are with inputs=."
                )
        return found

    def are_listed(self, batch: Any) -> bool:
        """Whether the inputs are the elements of one list."""
        if callable(self._inputs):
            return isinstance(self._inputs(batch), (list, tuple))
        paths = self._paths(batch)
        return len({path[:-1] for path in paths}) == 1 and len(paths[0]) > 1 and isinstance(paths[0][-1], int)

    def labels(self, batch: Any) -> Any:
        """The labels of a batch.

        Raises:
            ValueError: if they are not found; the message lists the batch's tensors.
        """
        found, path = self._find_labels(batch)
        if not found:
            raise ValueError(
                f"No labels were recognised in the batch, {_describe(batch)}: say where they are with labels=. Recognised are "
                f"position 1 of a tuple or list, and the names {', '.join(LABEL_KEYS)}."
            )
        return self._labels(batch) if callable(self._labels) else value_at(batch, path)

    def labels_or_none(self, batch: Any) -> Any:
        """The labels; ``None`` if none are named and none are recognised.

        Raises:
            ValueError: if they are named and not found.
        """
        return self.labels(batch) if self._find_labels(batch)[0] else None

    def replace(self, batch: Any, inputs: Tensor | list[Tensor]) -> Any:
        """A copy of the batch with other inputs; the given batch is not changed.

        Args:
            batch: the batch.
            inputs: one tensor, or a list of as many tensors as :meth:`inputs` finds.
        """
        several = inputs if isinstance(inputs, list) else [inputs]
        if callable(self._inputs):
            as_found = self._inputs(batch)
            if isinstance(as_found, (list, tuple)):
                return self._inputs(batch, type(as_found)(several))
            return self._inputs(batch, several[0])
        for path, each in zip(self._paths(batch), several, strict=True):
            batch = with_value_at(batch, path, each)
        return batch

    def _paths(self, batch: Any) -> list[Path]:
        if self._inputs is not None:
            keys = self._inputs if isinstance(self._inputs, list) else [self._inputs]
            return [path for key in keys for path in _leaves(batch, self._named(batch, "inputs", key))]
        found = _conventional(batch)
        if found is None:
            raise ValueError(
                f"No inputs were recognised in the batch, {_describe(batch)}: say where they are with inputs=. Recognised are "
                f"position 0 of a tuple or list, and the names {', '.join(INPUT_KEYS)}."
            )
        return found

    def _find_labels(self, batch: Any) -> tuple[bool, Path]:
        if callable(self._labels):
            return True, ()
        if self._labels is not None:
            return True, self._named(batch, "labels", self._labels)
        names = field_names(batch)
        for name in LABEL_KEYS:
            if name in names:
                return True, (name,)
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return True, (1,)
        return False, ()

    @staticmethod
    def _named(batch: Any, role: str, key: Any) -> Path:
        path = resolve(batch, key)
        if path is not None:
            return path
        is_path = isinstance(key, tuple) or (isinstance(key, str) and "." in key)
        there = tensors_text(batch)
        raise ValueError(
            f"{role}={key!r} {'is not a path in' if is_path else 'names nothing in'} the batch, {_describe(batch)}."
            + (f" Its tensors are: {there}." if there else "")
        )


def _conventional(batch: Any) -> list[Path] | None:
    """The paths of the inputs by the rules of :class:`BatchReader`; ``None`` if there are none."""
    if isinstance(batch, Tensor):
        return [()]
    names = field_names(batch)
    key: Any = next((name for name in INPUT_KEYS if name in names), None)
    if key is None and isinstance(batch, (tuple, list)) and len(batch):
        if not isinstance(batch[0], Tensor) and _all_batches(list(batch)):
            return _of_each(batch, range(len(batch)))
        key = 0
    if key is None:
        if isinstance(batch, Mapping) and _all_batches(list(batch.values())):
            return _of_each(batch, list(batch))
        return _only_floats(batch, names)
    found = get_field(batch, key)
    if isinstance(found, Tensor) or not isinstance(found, (tuple, list, Mapping)):
        return [(key,)]
    inside = list(found.values()) if isinstance(found, Mapping) else list(found)
    if _is_views(inside):
        return [(key, *path) for path in tensor_paths(found)]
    deeper = _conventional(found)
    return [(key,)] if deeper is None else [(key, *path) for path in deeper]


def _only_floats(batch: Any, names: list[Any]) -> list[Path] | None:
    """The only named tensor that can be an input: floating-point, with two or more dimensions, and not a mask, weight or label."""
    found = [
        name
        for name in names
        if isinstance(value := get_field(batch, name), Tensor) and value.is_floating_point() and value.ndim > 1
        if name not in LABEL_KEYS and "mask" not in str(name) and "weight" not in str(name)
    ]
    return [(found[0],)] if len(found) == 1 else None


def _of_each(batch: Any, keys: Any) -> list[Path] | None:
    found: list[Path] = []
    for key in keys:
        paths = _conventional(get_field(batch, key))
        if paths is None:
            return None
        found += [(key, *path) for path in paths]
    return found


def _all_batches(values: list[Any]) -> bool:
    """Whether each value is itself a batch: a container with inputs and something else."""
    return len(values) > 1 and all(
        isinstance(each, (tuple, list, Mapping))
        and len(each) > 1
        and _conventional(each) is not None
        and not _is_views(each)
        for each in values
    )


def _is_views(values: Any) -> bool:
    """Whether these are floating-point tensors with the same number of dimensions, two or more: several views, or a list of images."""
    found = list(values.values()) if isinstance(values, Mapping) else list(values)
    tensors = [each for each in found if isinstance(each, Tensor) and each.is_floating_point() and each.ndim > 1]
    return len(found) > 0 and len(tensors) == len(found) and len({each.ndim for each in tensors}) == 1


def _leaves(batch: Any, path: Path) -> list[Path]:
    """The paths of the inputs below a path: all tensors of a container of similar tensors, otherwise the inputs of the batch there."""
    found = value_at(batch, path)
    if not isinstance(found, (tuple, list, Mapping)):
        return [path]
    deeper = [(*leaf,) for leaf in tensor_paths(found)] if _is_views(found) else _conventional(found)
    return [path] if deeper is None else [path + leaf for leaf in deeper]


def _describe(batch: Any) -> str:
    names = field_names(batch)
    if isinstance(batch, Tensor):
        return f"which is one tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)) and not names:
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(_brief(item) for item in batch)})"
    return f"a {type(batch).__name__} with {', '.join(map(repr, names)) or 'nothing in it'}"


def _brief(item: Any) -> str:
    return f"tensor {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__

"""Short texts that are equal for equal models, data and settings, in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LENGTH = 32
"""Number of characters of a digest, 128 bits: equal by chance is out of the question."""


def described(value: Any, _outer: tuple[int, ...] = ()) -> str:
    """A setting as a text: an attack with all its options, a function by its place, a tensor by its digest.

    Unlike ``repr`` it holds no addresses, which differ from process to process. Code is not looked into: a function with another body
    at the same place is described alike.

    Args:
        value: the setting.

    Example:
        >>> from lightning_wdefense.attacks import PGD, ThreatModel
        >>> described({"steps": 3, "loss": torch.nn.functional.cross_entropy})
        "{'steps': 3, 'loss': torch.nn.functional.cross_entropy}"
        >>> described(PGD(ThreatModel(eps=0.1))) == described(PGD(ThreatModel(eps=0.1), steps=11))
        False
    """
    if id(value) in _outer:
        return "..."  # an object that holds itself
    each = partial(described, _outer=(*_outer, id(value)))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, nn.Module):
        return f"{_place(type(value))} {model_digest(value)}"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"tensor {data_digest(value)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{each(key)}: {each(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(each, value)) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(each, value))) + "}"
    if isinstance(value, partial):
        return f"partial{each((value.func, value.args, value.keywords))}"
    if hasattr(value, "__qualname__"):  # classes, functions and methods
        owner = getattr(value, "__self__", None)
        return _place(value) if owner is None or isinstance(owner, type) else f"{each(owner)}.{value.__name__}"
    fields = ", ".join(f"{name}={each(item)}" for name, item in getattr(value, "__dict__", {}).items())
    return f"{_place(type(value))}({fields})"


def data_digest(*values: Any) -> str:
    """A digest of tensors, arrays and other values, such as the inputs and labels of a batch.

    Example:
        >>> data_digest(torch.zeros(2)) == data_digest(torch.zeros(2)), data_digest(torch.zeros(2)) == data_digest(torch.zeros(1, 2))
        (True, False)
    """
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "biufc" else value.tolist()
        if isinstance(value, Tensor):
            _add(digest, value)
        else:
            digest.update(described(value.tolist() if isinstance(value, np.ndarray) else value).encode())
    return digest.hexdigest()[:LENGTH]


def model_digest(model: nn.Module) -> str:
    """A digest of a model: the layers with what they print of their settings, and the values of all parameters and buffers.

    Example:
        >>> from torch import nn
        >>> model_digest(nn.ReLU()) == model_digest(nn.GELU())
        False
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {_place(type(module))} {module.extra_repr()}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()[:LENGTH]


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.device.type == "meta":
        return
    values = tensor.detach().cpu()
    values = values.to_dense() if values.layout != torch.strided else values
    digest.update(values.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())


def _place(found: Any) -> str:
    return f"{found.__module__}.{found.__qualname__}"

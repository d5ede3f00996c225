"""Small vectors on a CPU as NumPy arrays, whose operations have less overhead than those of tensors.

NumPy and PyTorch share most names, so that code can be written for either, with the module in a variable ``xp``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

Array = Any
"""A tensor or a NumPy array."""

SMALL = 1024
"""Number of entries up to which a vector is small. For larger ones NumPy starts threads of its own, beside those of PyTorch."""


def namespace(like: Tensor) -> ModuleType:
    """The module for vectors like this one."""
    return numpy if like.device.type == "cpu" and like.numel() <= SMALL else torch


def array(xp: ModuleType, tensor: Tensor) -> Array:
    """A tensor as an array of ``xp``, in the same memory."""
    return tensor.numpy() if xp is numpy else tensor


def tensor(array: Array) -> Tensor:
    """The same backwards."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)


def solve(xp: ModuleType, matrix: Array, right: Array) -> Array:
    """Solution ``(..., M)`` of small linear systems ``(..., M, M)``; not a number where a matrix is singular."""
    if xp is torch:
        return torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)
    try:
        return numpy.linalg.solve(matrix, right[..., None])[..., 0]
    except numpy.linalg.LinAlgError:
        return numpy.full_like(right, numpy.nan)


def longest(xp: ModuleType, vectors: Array) -> float:
    """Largest absolute value; not a number if one of them is not."""
    return float(abs(vectors).max() if xp is numpy else torch.linalg.vector_norm(vectors, float("inf")))


def norm(xp: ModuleType, vectors: Array) -> Array:
    """Euclidean lengths ``(...)`` of vectors ``(..., M)``."""
    if xp is torch:
        return torch.linalg.vector_norm(vectors, dim=-1)
    return numpy.sqrt(numpy.dot(vectors, vectors) if vectors.ndim == 1 else (vectors * vectors).sum(-1))

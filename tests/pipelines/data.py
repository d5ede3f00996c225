"""Data for the matrix: scikit-learn's digits, and what is made of random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.lightning_modules import digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

TRAIN, VAL = 600, 200


def loaders(*columns: Tensor, batch_size: int = 100, collate: Callable[[list], Any] | None = None) -> tuple[Any, Any]:
    """The first rows for training and the next for validation."""

    def loader(start: int, stop: int, shuffle: bool) -> DataLoader:
        rows = TensorDataset(*(column[start:stop] for column in columns))
        return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=collate)

    return loader(0, TRAIN, True), loader(TRAIN, TRAIN + VAL, False)


def dictionaries(*names: str) -> Callable[[list], dict[str, Tensor]]:
    """Collates rows into a dictionary of columns."""
    return lambda rows: dict(zip(names, stack(rows), strict=True))


def stack(rows: list) -> Sequence[Tensor]:
    """Rows as columns."""
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def digit_loaders(**options: Any) -> tuple[Any, Any]:
    """Images ``(N, 1, 8, 8)`` in [0, 1] and their labels."""
    return loaders(*digits(), **options)


def generator(seed: int = 0) -> torch.Generator:
    """For data that are made."""
    return torch.Generator().manual_seed(seed)

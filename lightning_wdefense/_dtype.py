"""Dtypes: the widest of a device, and PyTorch's default for a while, safely among threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lightning_wdefense._locks import locked

NO_FLOAT64 = frozenset({"mps"})
"""Devices on which there are no tensors in float64."""


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make this dtype the default for new tensors inside the context. Lightning's "true" precisions change the default too.

    The default belongs to the whole process. While a thread has changed it here, other threads that want to change it
    wait.
    """
    if torch.get_default_dtype() == dtype:
        yield
        return
    with locked([torch.set_default_dtype]):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

"""Large buffers that are reused: on a CPU, the first access to new memory takes longer than the arithmetic in it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

KEPT = 2**24
"""Number of elements up to which a buffer is kept (64 MiB in float32)."""

_local = threading.local()


class Workspace:
    """Buffers by name, each as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory that is valid until the same name is asked for again. A GPU's allocator keeps its own."""
        size = math.prod(shape)
        if like.device.type != "cpu" or size > KEPT:
            return like.new_empty(shape)
        buffer = self._buffers.get((name, like.dtype))
        if buffer is None or buffer.numel() < size:
            # Not an inference tensor, which later calls outside that mode could not write to.
            with torch.inference_mode(False):
                buffer = self._buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
        return buffer[:size].view(*shape)


@contextmanager
def workspace() -> Iterator[Workspace]:
    """The workspace of this thread, or a new one if that is in use."""
    mine = getattr(_local, "idle", None) or Workspace()
    _local.idle = None
    try:
        yield mine
    finally:
        _local.idle = mine

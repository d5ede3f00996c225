"""Record a computation on a GPU as a CUDA graph, so that it is launched as a whole afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

WARMUP = 3
"""Number of passes before a recording, in which libraries choose their algorithms."""


def tensor_signature(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Shape, dtype and device: a tensor can take the place of a graph's input only if they are equal."""
    return tensor.shape, tensor.dtype, tensor.device


def record(compute: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Record a computation as a CUDA graph.

    Args:
        compute: the computation; it takes no arguments.
        device: the CUDA device.

    Returns:
        A function that runs the computation again, and its result: tensors in the graph's memory, which each run
        overwrites.
    """
    with _recording, torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), _side_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    compute()
            return _captured(compute, side)
        finally:
            current.wait_stream(side)


_recording = threading.RLock()
"""Lock: PyTorch records one graph at a time."""

_abandoned: list[torch.cuda.CUDAGraph] = []


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One stream for all recordings: libraries keep a workspace for each stream.
    return torch.cuda.Stream(device)


def _captured(compute: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    device = torch.cuda.current_device()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    users = generator.graphsafe_get_state()
    # Until PyTorch 2.12 a failed capture leaves the generator and the allocator in the state of an unfinished capture. So the
    # generator gets another state for the capture, the allocator is told of its end, and the graph, which both may still use, is kept.
    generator.graphsafe_set_state(generator.clone_state())
    cause: Exception | None = None
    try:
        # The outer context is needed because the inner one does not restore the current stream if the end of the capture fails.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                result = compute()
            except Exception as error:
                cause = error
                raise
    except BaseException:
        _abandoned.append(graph)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(device, pool)
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
        if cause is not None:  # the error at the end of the capture does not name the cause
            raise cause from None
        raise
    finally:
        generator.graphsafe_set_state(users)
    return graph.replay, result

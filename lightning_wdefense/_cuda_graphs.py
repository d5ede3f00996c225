"""Work on a GPU as a CUDA graph: recorded once, and launched as one afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

WARMUP = 3
"""Passes before a recording, in which libraries choose their algorithms."""


def tensor_signature(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """What another tensor must have in common with one that a graph reads."""
    return tensor.shape, tensor.dtype, tensor.device


def record(compute: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Record a computation.

    Returns:
        What does it again, and the result: tensors that hold it then, in the memory of the graph.
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
"""PyTorch records one graph at a time."""

_abandoned: list[torch.cuda.CUDAGraph] = []


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all recordings: libraries keep a workspace for each stream.
    return torch.cuda.Stream(device)


def _captured(compute: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    device = torch.cuda.current_device()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    users = generator.graphsafe_get_state()
    # Until PyTorch 2.12 a capture that fails leaves the generator and the allocator as in the midst of it: the generator is given another
    # state meanwhile, the allocator is told of the end, and the graph, which both may still ask, stays.
    generator.graphsafe_set_state(generator.clone_state())
    cause: Exception | None = None
    try:
        # The outer context, because the inner one leaves its stream the current one where the end of a capture fails.
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
        if cause is not None:  # the end of the capture only says that there was something
            raise cause from None
        raise
    finally:
        generator.graphsafe_set_state(users)
    return graph.replay, result

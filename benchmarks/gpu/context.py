"""What a stage is told, and how it measures time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.book import Book, Row


@dataclass(frozen=True)
class Context:
    """Where and how long a stage runs.

    Attributes:
        stage: its name.
        book: where its figures go.
        deadline: ``time.monotonic()`` at which it should have ended; a little later it is killed.
        rehearse: on a CPU, at toy size.
        data: folder of ``cifar10.npz``, if there is one.
        missing: figures for which no time was left.
    """

    stage: str
    book: Book
    deadline: float
    rehearse: bool
    data: Path | None
    missing: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def measure(self, name: str, compute: Callable[[], Row], *, seconds: float = 0.0) -> Row:
        """A row of the book, unless so many seconds are not left for it."""
        if self.left < (0 if self.rehearse else seconds):
            self.missing.append(name)
            print(f"{time.strftime('%M:%S')} {name}: no time left", flush=True)
            return {}
        return self.book.measure(self.stage, name, compute)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def timed(call: Callable[[], Any], context: Context, *, repeats: int = 30, most: float = 2.0) -> Row:
    """Milliseconds of a call by the wall clock, the work of the host included: median, and 10% to 90%.

    Three calls first, for what is compiled or allocated once; then so many, in at most so many seconds, but three.
    """
    least = 2 if context.rehearse else 3
    for _ in range(0 if context.rehearse else 3):
        call()
    context.synchronize()
    seconds, began = [], time.perf_counter()
    while len(seconds) < (least if context.rehearse else repeats) and (
        len(seconds) < least or time.perf_counter() - began < most
    ):
        start = time.perf_counter()
        call()
        context.synchronize()
        seconds.append(1e3 * (time.perf_counter() - start))
    spread = statistics.quantiles(seconds, n=10)
    return {"ms": statistics.median(seconds), "10% to 90%": [spread[0], spread[-1]]}


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB of CUDA tensors that a call allocates beyond what was there, at its peak; NaN on a CPU."""
    if not torch.cuda.is_available():
        call()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(call: Callable[[], Any]) -> int:
    """How many kernels and copies a call puts on the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

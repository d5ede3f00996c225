"""Which tiles and which precision the streaming kernels should have: time of a pass, and its error against float64.

A choice of the developer, not of a user: what is best here goes into ``transport/entropic/triton/streaming.py`` by hand.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.book import Row
from benchmarks.gpu.context import Context, timed

POINTS = 20_000
DIMENSIONS = (64, 512)
EPS = 0.05
WORKERS = 12
SETTINGS = [
    ("ieee", 64, 64, 16, 8, 3), ("ieee", 64, 64, 32, 4, 3), ("ieee", 128, 64, 32, 8, 2),
    ("tf32x3", 64, 64, 16, 4, 3), ("tf32x3", 64, 64, 32, 4, 3), ("tf32x3", 64, 64, 64, 4, 2),
    ("tf32x3", 128, 64, 32, 4, 3), ("tf32x3", 128, 64, 32, 8, 3), ("tf32x3", 128, 64, 64, 8, 2),
    ("tf32x3", 64, 128, 32, 8, 3), ("tf32x3", 128, 128, 32, 8, 3), ("tf32x3", 128, 128, 16, 8, 4),
    ("tf32", 128, 128, 32, 8, 3),
]  # fmt: skip
"""Precision, rows, columns, coordinates at a time, warps, stages of the pipeline."""


@contextlib.contextmanager
def tiles(setting: tuple[Any, ...]) -> Iterator[None]:
    """The streaming kernels are compiled for a setting inside."""
    from lightning_wdefense.transport.entropic.triton import streaming

    precision, rows, columns, depth, warps, stages = setting
    settings = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PRECISION": precision, "num_warps": warps}
    settings |= {"num_stages": stages, "enable_fp_fusion": True}
    with mock.patch.object(streaming, "tiles", return_value=settings), mock.patch.object(streaming, "ROWS", rows):
        yield


def clouds(points: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(points, d, generator=rng).to(device) / math.sqrt(d) for _ in range(2))
    return x, y, torch.randn(points, generator=rng).to(device)


def compile_for(setting: tuple[Any, ...], d: int, device: str) -> None:
    """In a process of its own; what is compiled stays in Triton's cache."""
    from lightning_wdefense.transport.entropic.triton.streaming import log_sums, weighted_points

    x, y, exponents = clouds(256, d, device)
    with tiles(setting):
        weighted_points(x, y, exponents, log_sums(x, y, exponents, EPS), EPS)


def one(setting: tuple[Any, ...], d: int, context: Context) -> Row:
    from lightning_wdefense.transport.entropic.triton.streaming import log_sums, weighted_points

    points = 20 if context.rehearse else POINTS
    x, y, exponents = clouds(points, d, context.device.type)
    with tiles(setting):
        sums = log_sums(x, y, exponents, EPS)
        taken = timed(lambda: log_sums(x, y, exponents, EPS), context, repeats=10, most=0.3)["ms"]
        averages = timed(lambda: weighted_points(x, y, exponents, sums, EPS), context, repeats=5, most=0.3)["ms"]
    exact = (exponents.double() - 0.5 * torch.cdist(x[:1000].double(), y.double()).square() / EPS).logsumexp(1)
    operations = 2 * points**2 * d
    return {
        "log sums, ms": taken,
        "TFLOP/s": operations / taken / 1e9,
        "averages, ms": averages,
        "log sums off by": float((sums[:1000] - exact).abs().max()),
    }


def in_blocks(d: int, context: Context) -> Row:
    """The same by PyTorch, block by block of rows."""
    points = 20 if context.rehearse else POINTS
    x, y, exponents = clouds(points, d, context.device.type)
    row, column = 0.5 * x.square().sum(1), exponents - 0.5 * y.square().sum(1) / EPS

    def call() -> Tensor:
        parts = (torch.addmm(column, some, y.mT, alpha=1 / EPS).logsumexp(1) for some in x.split(3000))
        return torch.cat(list(parts)) - row / EPS

    return {"log sums, ms": timed(call, context, repeats=10, most=0.5)["ms"]}


def run(context: Context) -> None:
    settings = SETTINGS[:1] if context.rehearse else SETTINGS
    dimensions = (5,) if context.rehearse else DIMENSIONS
    if not context.rehearse:
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(compile_for, setting, DIMENSIONS[0], "cuda") for setting in settings]
            for future in waiting:
                with contextlib.suppress(Exception):  # told when it is timed
                    future.result()
    for d in dimensions:
        context.measure(f"PyTorch in blocks, {d} dimensions", lambda d=d: in_blocks(d, context))
        for setting in settings:
            name = f"{' '.join(map(str, setting))}, {d} dimensions"
            context.measure(name, lambda setting=setting, d=d: one(setting, d, context), seconds=1)

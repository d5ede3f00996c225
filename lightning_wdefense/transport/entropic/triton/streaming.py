"""Sums over the kernel ``exp(-|x - y|^2 / (2 eps))`` of two clouds, the matrix never stored: ``O((N + M) D)`` memory.

The cost is made anew, tile by tile, from the points, and used up at once. Points should lie near the origin: the squared
distance comes from products, which cancel.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PRECISION = "tf32x3"
"""Three products on the tensor cores, which are as exact as float32; TF32 alone has 10 bits, and the exponent is a difference of
products, divided by ``eps``. ``"ieee"``, without tensor cores, takes five times as long (H100, ``python -m benchmarks.gpu --stages tiles``)."""

ROWS = 64
"""Points of ``x`` that a program answers for."""

COLUMNS = 64
"""Points of ``y`` that it takes at a time."""

DEPTH = 16
"""Coordinates of the points that are multiplied at a time."""

WIDTH = 64
"""Coordinates that a program averages."""

LOWEST = tl.constexpr(-1e38)
"""In place of minus infinity where two of them would be subtracted."""


@triton.jit
def exponents_of(
    x,
    y,
    exponents,
    rows,
    columns,
    n,
    m,
    depth,
    inverse_eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of ``exponents_j - |x_i - y_j|^2 / (2 eps)``, minus infinity beyond the last column."""
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    square_x, square_y = tl.zeros([ROWS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        some_x = tl.load(x + rows[:, None] * depth + k, mask=(rows < n)[:, None] & (k < depth)[None, :], other=0.0)
        some_y = tl.load(
            y + columns[:, None] * depth + k, mask=(columns < m)[:, None] & (k < depth)[None, :], other=0.0
        )
        products = tl.dot(some_x, tl.trans(some_y), products, input_precision=PRECISION)
        square_x += tl.sum(some_x * some_x, 1)
        square_y += tl.sum(some_y * some_y, 1)
    cost = tl.maximum(0.5 * (square_x[:, None] + square_y[None, :]) - products, 0.0)
    return tl.load(exponents + columns, mask=columns < m, other=-float("inf"))[None, :] - cost * inverse_eps


@triton.jit(do_not_specialize=["n", "m", "inverse_eps"])
def log_sums_kernel(
    x,
    y,
    exponents,
    sums,
    n,
    m,
    depth,
    inverse_eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`log_sums` of some rows, scaled by the largest term so far."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    top, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, m, COLUMNS):
        columns = first + tl.arange(0, COLUMNS).to(tl.int64)
        tile = exponents_of(x, y, exponents, rows, columns, n, m, depth, inverse_eps, ROWS, COLUMNS, DEPTH, PRECISION)
        higher = tl.maximum(top, tl.max(tile, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(tile - higher[:, None]), 1)
        top = higher
    tl.store(sums + rows, top + tl.log(total), mask=rows < n)


@triton.jit(do_not_specialize=["n", "m", "inverse_eps"])
def weighted_points_kernel(
    x,
    y,
    exponents,
    sums,
    averages,
    n,
    m,
    depth,
    inverse_eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`weighted_points` of some rows and coordinates."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    scale = tl.load(sums + rows, mask=rows < n, other=0.0)
    scale = tl.where(scale > LOWEST, scale, 0.0)  # a row that sees no weight at all averages to zero
    average = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, m, COLUMNS):
        columns = first + tl.arange(0, COLUMNS).to(tl.int64)
        tile = exponents_of(x, y, exponents, rows, columns, n, m, depth, inverse_eps, ROWS, COLUMNS, DEPTH, PRECISION)
        points = tl.load(
            y + columns[:, None] * depth + k, mask=(columns < m)[:, None] & (k < depth)[None, :], other=0.0
        )
        average = tl.dot(tl.exp(tile - scale[:, None]), points, average, input_precision=PRECISION)
    tl.store(averages + rows[:, None] * depth + k, average, mask=(rows < n)[:, None] & (k < depth)[None, :])


def log_sums(x: Tensor, y: Tensor, exponents: Tensor, eps: float) -> Tensor:
    """Logarithms ``(N,)`` of weighted sums of the kernel, for points ``(N, D)`` and ``(M, D)`` and exponents ``(M,)``.

    In PyTorch ``(exponents - 0.5 * torch.cdist(x, y).square() / eps).logsumexp(1)``. The answer to a potential ``g`` is
    ``-eps`` times those for ``b.log() + g / eps``; an exponent of minus infinity leaves its point out.
    """
    (n, depth), m = x.shape, len(y)
    sums = x.new_empty(n)
    with torch.cuda.device_of(x):
        log_sums_kernel[(triton.cdiv(n, ROWS),)](
            x.contiguous(), y.contiguous(), exponents.contiguous(), sums, n, m, depth, 1 / eps, **tiles()
        )
    return sums


def weighted_points(x: Tensor, y: Tensor, exponents: Tensor, log_sums: Tensor, eps: float) -> Tensor:
    """Averages ``(N, D)`` of ``y`` with the weights that :func:`log_sums` sums: the gradient of the cost leads to them.

    In PyTorch ``(exponents - 0.5 * torch.cdist(x, y).square() / eps - log_sums[:, None]).exp() @ y``.
    """
    (n, depth), m = x.shape, len(y)
    averages = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        weighted_points_kernel[(triton.cdiv(n, ROWS), triton.cdiv(depth, WIDTH))](
            x.contiguous(),
            y.contiguous(),
            exponents.contiguous(),
            log_sums.contiguous(),
            averages,
            n,
            m,
            depth,
            1 / eps,
            WIDTH=WIDTH,
            **tiles(),
        )
    return averages


def tiles() -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": DEPTH,
        "PRECISION": PRECISION,
        "num_warps": 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }

"""Ground costs of small problems from the differences of coordinates: nothing cancels, so that float32 is enough."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Rows and columns that a program computes."""

UNROLLED = 4
"""Coordinates that are loaded at once."""

ALIGNED = 16
"""Rows begin at multiples of so many entries, so that the solver loads four at once."""

STRIDE = tl.constexpr(ALIGNED)


@triton.jit(do_not_specialize=["n", "m", "depth"])
def pairwise(x, y, cost, n, m, depth, ROOT: tl.constexpr, TILE: tl.constexpr, UNROLLED: tl.constexpr):
    """A tile of ``|x - y|`` or of half its square; what lies beyond the last column is finite and means nothing."""
    stride = tl.cdiv(m, STRIDE) * STRIDE
    across = tl.cdiv(stride, TILE)
    tiles = tl.cdiv(n, TILE) * across
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // across) * TILE + tl.arange(0, TILE)
    columns = (tile % across) * TILE + tl.arange(0, TILE)
    of_x = x + problem * n * depth + rows.to(tl.int64) * depth
    of_y = y + problem * m * depth + columns.to(tl.int64) * depth
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, depth, UNROLLED):
        for i in tl.static_range(UNROLLED):
            k = first + i
            left = tl.load(of_x + k, mask=(rows < n) & (k < depth), other=0.0)
            right = tl.load(of_y + k, mask=(columns < m) & (k < depth), other=0.0)
            difference = left[:, None] - right[None, :]
            total += difference * difference
    total = tl.sqrt(total) if ROOT else total * 0.5
    place = cost + problem * n * stride + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, total, mask=(rows < n)[:, None] & (columns < stride)[None, :])


def pairwise_costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """``|x - y|^p / p`` between points ``(B, N, D)`` and ``(B, M, D)``: ``(B, N, M)`` with rows that begin :data:`ALIGNED`."""
    (size, n, depth), m = x.shape, y.shape[1]
    cost = torch.empty(size, n, m + -m % ALIGNED, device=x.device, dtype=torch.float32)
    grid = (size * -(-n // TILE) * -(-cost.shape[-1] // TILE),)
    pairwise[grid](
        x.contiguous(), y.contiguous(), cost, n, m, depth, ROOT=p == 1, TILE=TILE, UNROLLED=UNROLLED, num_warps=4
    )
    return cost[..., :m]

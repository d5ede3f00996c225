"""How several programs share the solve of one transport problem, each with a slab of rows of the kernel matrix.

They meet twice in an iteration, to add up the column marginals. Everything else they all do alike, on the same numbers and in
the same order, so that they also take the same decisions.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PATIENCE = tl.constexpr(2**22)
"""Polls, some seconds, after which a program gives the others up: better a poor potential than a GPU that hangs."""

COLUMNS = 2048
"""Most columns: every program holds some vectors of that length."""

SLAB = 2**14
"""Entries of the matrix that the registers of a multiprocessor hold with ease. With twice as many, some vectors spill."""


def power_of_two(n: int) -> int:
    """The next one. Triton's own function takes longer than a small kernel."""
    return 1 << (n - 1).bit_length()


class Slabs(NamedTuple):
    """How a problem is spread: programs, rows of each, and columns, all of them powers of two."""

    programs: int
    rows: int
    columns: int

    @property
    def entries(self) -> int:
        """Size of a slab."""
        return self.rows * self.columns


def launch_settings(slabs: Slabs) -> dict[str, Any]:
    """How programs with such slabs are launched. Eight warps have 64 registers a thread for the matrix, and as many for vectors."""
    return {
        "PROGRAMS": slabs.programs,
        "ROWS": slabs.rows,
        "WIDTH": slabs.columns,
        "num_warps": 16 if slabs.entries > SLAB else min(8, max(1, slabs.entries // 1024)),
        "launch_cooperative_grid": slabs.programs > 1,  # fails if they cannot all run at once
        "enable_fp_fusion": True,
    }


def spread(n: int, m: int, size: int, device: torch.device) -> Slabs | None:
    """How to spread each of ``size`` problems ``(N, M)``, or ``None`` if they are too large.

    A program that others wait for must run at the same time as they: at most one for each multiprocessor.
    """
    columns, programs = max(16, power_of_two(m)), 1
    if device.type == "cuda":
        most = torch.cuda.get_device_properties(device).multi_processor_count // size
        while programs * SLAB < n * columns and 2 * programs <= most:
            programs *= 2
    slabs = Slabs(programs, max(4, power_of_two(-(-n // programs))), columns)
    fits = m <= COLUMNS and slabs.entries <= 2 * SLAB
    return slabs if fits or device.type != "cuda" else None


def portions(n: int, m: int, size: int, device: torch.device) -> list[tuple[slice, Slabs]]:
    """In how many launches ``size`` problems ``(N, M)`` are solved, and how those of each are spread; none if they are too large."""
    count = size
    while count > 1 and spread(n, m, count, device) is None:
        count = (count + 1) // 2
    found = []
    for start in range(0, size, max(1, count)):
        part = slice(start, min(size, start + count))
        slabs = spread(n, m, part.stop - start, device)
        if slabs is None:
            return []
        found.append((part, slabs))
    return found


class MeetingPlace(NamedTuple):
    """Memory by which the programs of each problem talk: their column sums, the totals, and a count of arrivals."""

    shares: Tensor
    totals: Tensor
    arrived: Tensor


def meeting_place(size: int, slabs: Slabs, device: torch.device) -> MeetingPlace:
    """A new one for ``size`` problems; a program by itself needs none."""
    columns = slabs.columns if slabs.programs > 1 else 0
    return MeetingPlace(
        torch.empty(size, slabs.programs, columns, device=device, dtype=torch.float32),
        torch.empty(size, columns, device=device, dtype=torch.float32),
        torch.zeros(size, device=device, dtype=torch.int32),
    )


@triton.jit
def meet(arrived, expected):
    """Wait until the programs have arrived ``expected`` times in all; whether they have."""
    tl.debug_barrier()  # what all threads wrote comes before the arrival of one of them
    seen = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    polls = 0
    while (seen < expected) & (polls < PATIENCE):
        seen = tl.atomic_add(arrived, 0, sem="acquire")
        polls += 1
    tl.debug_barrier()
    return seen >= expected


@triton.jit
def add_up(part, share, totals, arrived, meetings, own, columns, PROGRAMS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of a vector over the programs, in a fixed order: each adds up its share of the columns for all.

    Loads bypass the first cache, which is not kept up to date with what other programs write. Nobody writes again to what
    somebody may still read: there is a meeting in between.
    """
    tl.store(share + own * WIDTH + columns, part)
    met = meet(arrived, (meetings + 1) * PROGRAMS)
    everyone = tl.arange(0, PROGRAMS)
    mine = own * (WIDTH // PROGRAMS) + tl.arange(0, WIDTH // PROGRAMS)
    parts = tl.load(share + everyone[:, None] * WIDTH + mine[None, :], cache_modifier=".cg")
    tl.store(totals + mine, tl.sum(parts, 0))
    met = met & meet(arrived, (meetings + 2) * PROGRAMS)
    return tl.load(totals + columns, cache_modifier=".cg"), met

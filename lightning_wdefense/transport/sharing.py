"""Sharing the rows of one transport problem among the ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning_wdefense._ranks import Ranks, rows_of

SHARED = 2**24
"""Number of entries of a cost matrix from which the ranks share its rows. Below, each solves the whole problem, which needs no messages."""


class Share(NamedTuple):
    """How the points of all ranks are shared: rank ``r`` holds ``sizes[r]`` of them."""

    ranks: Ranks
    sizes: tuple[int, ...]

    @property
    def own(self) -> slice:
        """Where this rank's points are."""
        return rows_of(self.ranks.rank, self.sizes)


_here = threading.local()


@contextlib.contextmanager
def rows_shared(ranks: Ranks, sizes: Sequence[int]) -> Iterator[None]:
    """Context in which large Sinkhorn problems between clouds that all ranks hold are solved by all ranks together.

    Each rank computes the rows of its own points, and the gradient in them; the gradient in all other points is zero. All ranks must make
    the same calls with the same clouds.

    Args:
        ranks: the ranks.
        sizes: number of points of each rank. The points of rank 0 come first in both clouds.
    """
    before = getattr(_here, "share", None)
    _here.share = Share(ranks, tuple(sizes)) if ranks.size > 1 else None
    try:
        yield
    finally:
        _here.share = before


def current_share(n: int, m: int) -> Share | None:
    """How the rows of a problem of ``n`` and ``m`` points are shared here; ``None`` if each rank solves the whole of it."""
    share: Share | None = getattr(_here, "share", None)
    fits = share is not None and n == m == sum(share.sizes) and n * m >= SHARED
    return share if fits else None

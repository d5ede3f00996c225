"""A progress bar for long attacks."""

from __future__ import annotations

import math

from torch import Tensor
from tqdm import tqdm

DELAY = 3.0
"""Seconds before a bar appears. Attacks that take less time show no bar."""

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} attacks, {elapsed} so far, {remaining} left{postfix}"
"""What a bar shows, if the number of attacks is known."""


class TqdmProgress:
    """A tqdm progress bar that disappears when it is closed.

    Args:
        total: number of attacks; infinite if it is not known.
        show: whether there is a bar at all.
    """

    def __init__(self, total: float, show: bool) -> None:
        self._bar = tqdm(
            total=None if math.isinf(total) else int(total),
            desc="robustness",
            unit="attack",
            leave=False,
            delay=DELAY,
            disable=not show,
            bar_format=None if math.isinf(total) else FORMAT,
            smoothing=0,  # attacks differ in what they cost, so that the time of the last few says little of the time left
        )

    def skip(self, attacks: int) -> None:
        """So many attacks were done before, in no time that says something of the time left."""
        if not self._bar.disable:
            self._bar.n += attacks
            self._bar.initial += attacks
            self._bar.unpause()

    def advance(self, status: str) -> None:
        """Another attack is done."""
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def status(attack: str, left: Tensor) -> str:
    """What a bar says after an attack, from the mask ``(N,)`` of the samples that are still classified correctly."""
    return f"{attack}: {int(left.sum())}/{len(left)} left in the batch"

"""Means, differences and ratios, with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats


class Estimate(NamedTuple):
    """A mean with half the width of its 95% t-interval over seeds, which one seed does not have."""

    mean: float
    half: float | None
    count: int

    def text(self, *, sign: bool = False) -> str:
        """In per cent or points."""
        mean = f"{100 * self.mean:{'+' if sign else ''}.1f}"
        return mean if self.half is None else f"{mean} ± {100 * self.half:.1f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    count, mean = len(values), statistics.mean(values)
    if count == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count), count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The difference on the seeds that both have, which share initial weights and order of images."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def bootstrap_median(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95% interval of the median."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(values), (draws, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], draws: int = 2000) -> list[float]:
    """95% bootstrap interval of the ratio of medians."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.tensor(side)[torch.randint(len(side), (draws, len(side)), generator=generator)] for side in (ours, theirs)
    ]
    ratios = sides[0].median(1).values / sides[1].median(1).values
    return [round(float(q), 4) for q in torch.quantile(ratios, torch.tensor([0.025, 0.975]))]

"""Whether a series grows: its slope with an interval, against a bound that a long training could bear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Growth(NamedTuple):
    """How much a series grows from its first to its last window, as a share of its mean, with a 95% interval."""

    mean: float
    share: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        """``"flat"`` if the whole interval lies below the tolerance, ``"grows"`` if it lies above zero, otherwise ``"not shown"``."""
        if self.high <= tolerance:
            return "flat"
        return "grows" if self.low > 0 else "not shown"


def growth(values: Sequence[float]) -> Growth:
    """The line of least squares through the windows.

    Neighbouring windows resemble each other, which would make the interval too narrow. So it is widened by the residuals'
    autocorrelation at lag one, as if there were fewer windows.

    Args:
        values: one value a window, in their order; at least four.

    Raises:
        ValueError: if there are fewer.
    """
    if len(values) < 4:
        raise ValueError(f"A slope with an interval needs at least 4 windows, got {len(values)}: run more steps.")
    x, y = np.arange(len(values), dtype=float), np.asarray(values, dtype=float)
    x -= x.mean()
    slope = float(x @ y / (x @ x))
    residuals = y - y.mean() - slope * x
    variance = float(residuals @ residuals)
    lag = float(residuals[1:] @ residuals[:-1]) / variance if variance > 0 else 0.0
    effective = max(len(y) * (1 - max(lag, 0.0)) / (1 + max(lag, 0.0)), 3.0)
    half = float(stats.t.ppf(0.975, effective - 2)) * math.sqrt(variance / (effective - 2) / float(x @ x))
    length, mean = len(y) - 1, float(y.mean())
    return Growth(mean, slope * length / mean, (slope - half) * length / mean, (slope + half) * length / mean)

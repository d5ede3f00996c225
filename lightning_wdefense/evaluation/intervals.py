"""Intervals of shares, such as accuracies."""

from __future__ import annotations

import math

NORMAL_QUANTILE = 1.959963984540054
"""The 97.5% quantile of the normal distribution, for 95% intervals."""


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The Wilson 95% interval of a share: the values that a test at the 5% level does not reject.

    Unlike ``share ± 2 standard errors`` it stays in [0, 1], and does not shrink to a point at shares of 0 and 1.

    Args:
        share: the share that was found, in [0, 1].
        count: number of independent samples.

    Returns:
        The lower and the upper end, in [0, 1]; NaN if the share is NaN or there is no sample.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Example:
        >>> low, high = wilson_interval(0.5, 100)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.404 to 0.596
    """
    if math.isnan(share) or count <= 0:
        return math.nan, math.nan
    square = NORMAL_QUANTILE**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(share * (1 - share) / count + square / (4 * count**2)) * NORMAL_QUANTILE / (1 + square / count)
    # Rounding must not move an end past the share, which is the exact end for shares of 0 and 1.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))

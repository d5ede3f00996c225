"""The difference of two accuracies on the same samples."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lightning_wdefense.evaluation.intervals import NORMAL_QUANTILE, wilson_interval


class PairedDifference(NamedTuple):
    """The accuracy of a first model minus that of a second one, on the same samples.

    Attributes:
        difference: the difference, in [-1, 1].
        low: lower end of its 95% interval.
        high: upper end.
        only_first: number of samples that only the first model has right.
        only_second: number of samples that only the second model has right.
        p_value: of McNemar's exact test that both are equally accurate; NaN for shares of masks, where it does not apply.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def paired_difference(first: Tensor, second: Tensor) -> PairedDifference:
    """Compare two models on the same samples.

    Where each sample is right or wrong, the interval is Newcombe's score interval for paired proportions (his method 10), which is made
    of the two Wilson intervals and the correlation, and the p-value is that of McNemar's exact test. Where samples have shares of right
    labels (masks), the interval is the normal one of the mean difference.

    Args:
        first: share of each sample's labels that the first model has right, ``(N,)``; NaN where no label counts.
        second: the same of the second model.

    References:
        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data", 1998.
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947.

    Example:
        >>> import torch
        >>> found = paired_difference(torch.tensor([1.0] * 48 + [0.0] * 2), torch.tensor([1.0] * 36 + [0.0] * 12 + [1.0] * 2))
        >>> print(f"{found.difference:.2f}, {found.low:.4f} to {found.high:.4f}, p = {found.p_value:.4f}")
        0.20, 0.0569 to 0.3404, p = 0.0129
    """
    counted = first.isfinite() & second.isfinite()
    a, b = first[counted].double(), second[counted].double()
    only_first, only_second = int((a > b).sum()), int((a < b).sum())
    if not len(a):
        return PairedDifference(math.nan, math.nan, math.nan, 0, 0, math.nan)
    if bool(((a == 0) | (a == 1)).all() and ((b == 0) | (b == 1)).all()):
        both = int((a + b == 2).sum())
        low, high = newcombe_interval(both, only_first, only_second, len(a) - both - only_first - only_second)
        p_value = mcnemar_p_value(only_first, only_second)
    else:
        mean = float((a - b).mean())
        half = NORMAL_QUANTILE * float((a - b).std()) / math.sqrt(len(a)) if len(a) > 1 else math.nan
        low, high, p_value = mean - half, mean + half, math.nan
    return PairedDifference(float((a - b).mean()), low, high, only_first, only_second, p_value)


def newcombe_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """Newcombe's 95% score interval (method 10) of the difference of two paired shares.

    Args:
        both: number of samples that both models have right.
        only_first: number that only the first has right.
        only_second: number that only the second has right.
        neither: number that none has right.

    Returns:
        Its lower and its upper end.
    """
    count = both + only_first + only_second + neither
    shares = (both + only_first) / count, (both + only_second) / count
    (low_1, high_1), (low_2, high_2) = (wilson_interval(share, count) for share in shares)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    corrected = max(product - count / 2, 0.0) if product > 0 else float(product)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def length(of_first: float, of_second: float) -> float:
        return math.sqrt(max(of_first**2 - 2 * phi * of_first * of_second + of_second**2, 0.0))

    difference = (only_first - only_second) / count
    return (
        difference - length(shares[0] - low_1, high_2 - shares[1]),
        difference + length(high_1 - shares[0], shares[1] - low_2),
    )


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: a fair coin for each sample that only one model has right."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    if not count:
        return 1.0
    tail = sum(math.comb(count, wins) for wins in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)

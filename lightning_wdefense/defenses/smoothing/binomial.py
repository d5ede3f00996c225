"""Exact confidence bounds and tests for binomial counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BISECTIONS = 60
"""Number of bisection steps for a confidence bound; 2^-60 is below the precision of float64."""


def lower_bound(successes: Tensor, trials: int, alpha: float) -> Tensor:
    """Lower confidence bound of a probability (Clopper and Pearson). It is too high with a probability of at most ``alpha``.

    It is the ``p`` for which ``successes`` or more successes have the probability ``alpha``.

    Args:
        successes: number of successes, ``(N,)`` integers from 0 to ``trials``.
        trials: number of trials.
        alpha: one-sided error probability.

    Returns:
        ``(N,)`` in float64, on the CPU.

    References:
        Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.

    Example:
        >>> import torch
        >>> lower_bound(torch.tensor([0, 100]), 100, 0.05)  # for 100 successes it is the 100th root of 0.05
        tensor([0.0000, 0.9705], dtype=torch.float64)
    """
    counts, index = successes.cpu().unique(return_inverse=True)
    bounds = []
    for count in counts.tolist():
        low, high = 0.0, count / trials
        for _ in range(BISECTIONS if count else 0):
            middle = (low + high) / 2
            below = _log_tail(count, trials, middle) < math.log(alpha)
            low, high = (middle, high) if below else (low, middle)
        bounds.append(low)
    return torch.tensor(bounds, dtype=torch.float64)[index]


def two_sided_p_value(successes: Tensor, trials: Tensor) -> Tensor:
    """Two-sided p-value of the null hypothesis that successes and failures are equally likely (exact binomial test).

    Args:
        successes: number of successes, ``(N,)`` integers, at least as many as failures.
        trials: number of trials ``(N,)``, at least 1 and at most twice ``successes``.

    Returns:
        ``(N,)`` in float64, on the CPU.

    Example:
        >>> import torch
        >>> two_sided_p_value(torch.tensor([2, 5]), torch.tensor([4, 5]))
        tensor([1.0000, 0.0625], dtype=torch.float64)
    """
    tails = [_log_tail(*pair, 0.5) for pair in zip(successes.tolist(), trials.tolist(), strict=True)]
    return (2 * torch.tensor(tails, dtype=torch.float64).exp()).clamp(max=1.0)


def _log_tail(successes: int, trials: int, probability: float) -> float:
    """Log probability of ``successes`` or more successes."""
    if probability <= 0:
        return 0.0 if successes == 0 else -math.inf
    counts = torch.arange(successes, trials + 1, dtype=torch.float64)
    choices = math.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    return float((choices + counts * math.log(probability) + (trials - counts) * math.log1p(-probability)).logsumexp(0))

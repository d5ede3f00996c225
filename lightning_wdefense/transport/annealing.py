"""From which temperature down the potentials are found, and when to go up again; the same for PyTorch and for Triton."""

from __future__ import annotations

import math

from torch import Tensor

COOLING = 8.0
"""Ratio between a temperature of the annealing and the next one."""

WARMEST = 0.06
"""Share of the mean cost up to which, times ``COOLING``, a temperature is easy enough to start at."""

PATIENCE = 50
"""Iterations after which a first temperature at which the error is above ``ENTRY`` was too low to start at."""

REHEATINGS = 5
"""Higher temperatures that are tried then."""

WARM = 1.0
"""Marginal error of given potentials above which the annealing, from nothing, is the better start."""


def levels_above(mean: float | Tensor, eps: float | Tensor) -> int | Tensor:
    """How many temperatures come before the final one.

    Args:
        mean: the mean cost, a number or ``(B, 1)``.
        eps: the final temperature, likewise.
    """
    if isinstance(mean, Tensor):
        return (WARMEST * mean / eps).clamp(min=1).log().div(math.log(COOLING)).floor()
    return math.floor(math.log(max(1.0, WARMEST * mean / eps)) / math.log(COOLING))

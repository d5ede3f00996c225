"""Where an attack by gradient ascent starts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_wdefense.attacks.losses import AttackLoss
from lightning_wdefense.attacks.norms import random_normal
from lightning_wdefense.attacks.problem import Problem

RandomStart = bool | Literal["gaussian"]
"""``True`` for a uniform point in the ball, ``"gaussian"`` for the start of TRADES, ``False`` for the clean inputs."""

GAUSSIAN_START = 0.001
"""Standard deviation of the ``"gaussian"`` start, as in TRADES, as a fraction of the range of the bounds."""


def start(problem: Problem, random_start: RandomStart) -> Tensor:
    """The inputs to start from, ``(N, ...)`` in data units, inside the ball and the bounds."""
    clean, bounds = problem.data, problem.threat.bounds
    if random_start == "gaussian":
        spread = 1.0 if bounds is None else bounds[1] - bounds[0]
        return problem.project(clean + GAUSSIAN_START * spread * random_normal(clean, problem.generator))
    return problem.random_point(problem.threat.eps) if random_start else clean


def check_start(random_start: RandomStart, loss: AttackLoss) -> None:
    """Refuse an unknown start, and a start at the clean inputs with a loss that has no gradient there.

    Raises:
        ValueError: in these cases.
    """
    if random_start not in (True, False, "gaussian"):
        raise ValueError(f'random_start must be True, False or "gaussian", got {random_start!r}.')
    if loss == "kl" and not random_start:
        raise ValueError('loss="kl" has zero gradient at the clean inputs: use random_start=True or "gaussian".')

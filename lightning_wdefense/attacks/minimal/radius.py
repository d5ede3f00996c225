"""The radii and steps of a search for minimal perturbations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.attacks.losses import AttackLoss
from lightning_wdefense.attacks.problem import Problem


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """A value that falls from ``first`` at step 0 to nearly ``last`` at the last of ``steps`` steps, by half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def linear_distance(problem: Problem, outputs: Any, gradient: Tensor, loss: AttackLoss = "margin") -> Tensor:
    """Distance to the boundary of the linearised model, ``(N,)``, in data units: at most the diameter of the box, 0 without a gradient.

    Args:
        problem: the batch.
        outputs: the model's outputs.
        gradient: the gradient ``(N, ...)`` of their losses.
        loss: a loss that is 0 at the boundary.
    """
    ball = problem.threat.ball
    margins, slopes = problem.loss(outputs, loss).detach().abs().to(gradient.dtype), ball.dual(gradient)
    distances = torch.where(slopes > 0, margins / slopes, 0.0)
    if problem.box.low is None or problem.box.high is None:
        return distances
    return torch.minimum(distances, ball.length(problem.box.high - problem.box.low))


def check_search(steps: int, step_size: float, tightening: int) -> None:
    """Refuse numbers that are out of range.

    Raises:
        ValueError: if there is no step, a step size is not positive, or ``tightening`` is negative.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if not step_size > 0:
        raise ValueError(f"step_size must be positive (multiples of the radius), got {step_size}.")
    if tightening < 0:
        raise ValueError(f"tightening must not be negative, got {tightening}.")

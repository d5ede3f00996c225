"""The lengths of the steps of a search for minimal perturbations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_wdefense.attacks.norms import BALLS
from lightning_wdefense.attacks.problem import Problem

FAR = 4.0
"""Without bounds, length of the first step as a multiple of the distance to the boundary of the linearised model."""


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """A value that falls from ``first`` at step 0 to nearly ``last`` at the last of ``steps`` steps, by half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def first_step(step_size: float | None, problem: Problem, margins: Tensor, gradient: Tensor) -> Tensor:
    """L2 length of the first step of each sample, ``(N,)``, in data units.

    Args:
        step_size: the length that the user gave; ``None`` for the range of the bounds, or without bounds for :data:`FAR` times the
            distance to the boundary of the linearised model.
        problem: the batch.
        margins: margins ``(N,)`` of the clean inputs.
        gradient: their gradient ``(N, ...)``.
    """
    bounds = problem.threat.bounds
    if step_size is None and bounds is None:
        return FAR * linear_distance(margins, BALLS["l2"].dual(gradient))
    if step_size is None:
        step_size = bounds[1] - bounds[0]
    return torch.full_like(margins, step_size)


def linear_distance(margins: Tensor, slopes: Tensor) -> Tensor:
    """Distance to the boundary of the linearised model, ``(N,)``, from margins and the dual norms of their gradients."""
    return margins.abs() / slopes.clamp_min(torch.finfo(slopes.dtype).tiny)


def check_search(steps: int, step_size: float | None, tightening: int) -> None:
    """Refuse numbers that are out of range.

    Raises:
        ValueError: if there is no step, a step size is not positive, or ``tightening`` is negative.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size must be positive (data units), got {step_size}.")
    if tightening < 0:
        raise ValueError(f"tightening must not be negative, got {tightening}.")

"""Shortest moves onto a hyperplane inside a box, for FAB."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense.attacks.norms import per_sample, rows
from lightning_wdefense.attacks.threat import Box

NEWTON_STEPS = 30
"""Most of Newton's steps; a handful are usual, because the function is piecewise linear."""
ROUNDING = 1e-4
"""The last of Newton's steps is no longer than this share of the way: what another would add is far below FAB's overshoot."""


def shortest_move(points: Tensor, normal: Tensor, gap: Tensor, box: Box, norm: str) -> Tensor:
    """The shortest ``move`` with ``<normal, move> = gap`` and ``points + move`` in the box, in norm ``linf`` or ``l2``.

    Every coordinate moves as fast as its rate, 1 in ``linf`` and ``|normal|`` in ``l2``, until it meets the box; what
    is sought is the time at which the gap is closed. The part of the gap that is closed is a concave, piecewise linear
    function of time, so Newton's method from 0 never goes too far and ends after finitely many steps.

    Args:
        points: ``(N, ...)``, inside the box.
        normal: normals of the hyperplanes, in the shape of ``points``.
        gap: ``(N,)``.
        box: the limits.
        norm: ``"linf"`` or ``"l2"``.

    Returns:
        The moves; where the hyperplane does not meet the box, the move as far towards it as the box allows.
    """
    largest = rows(normal).abs().amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
    # Divided by its largest entry, because squares of tiny gradients would underflow; and turned, so that the gap is not negative.
    normal = normal * per_sample(torch.where(gap < 0, -1, 1) / largest, normal)
    gap, weight, sign = gap.abs() / largest, normal.abs(), normal.sign()
    rate = sign.abs() if norm == "linf" else weight
    speed, time = weight * rate, torch.zeros_like(gap)
    if box.low is None or box.high is None:
        return sign * rate * per_sample(_quotient(gap, rows(speed).sum(1)), normal)
    room = torch.maximum((box.high - points) * sign, (box.low - points) * sign)
    free = torch.empty_like(room)
    for _ in range(NEWTON_STEPS):
        way = rate * per_sample(time, rate)
        rest = gap - (rows(weight) * rows(torch.minimum(way, room))).sum(1)
        # As numbers: on a CPU, operations on boolean tensors cost many times as much.
        slope = rows(torch.gt(room, way, out=free).mul_(speed)).sum(1)
        forward = _quotient(rest, slope).clamp_min(0)
        time = time + forward
        if not bool((forward > ROUNDING * time).any()):
            break
    return sign * torch.minimum(rate * per_sample(time, rate), room)


def _quotient(number: Tensor, divisor: Tensor) -> Tensor:
    """The quotient; 0 where there is nothing to divide by."""
    return torch.where(divisor > 0, number / divisor, 0)

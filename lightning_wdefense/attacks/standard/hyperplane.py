"""Shortest moves onto a hyperplane inside a box, for FAB."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.threat import Box

NEWTON_STEPS = 30
"""Most of Newton's steps; a handful are usual, because the function is piecewise linear."""


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
    # Divided by its largest entry: squares of tiny gradients would underflow.
    largest = normal.reshape(len(normal), -1).abs().amax(1).clamp_min(torch.finfo(normal.dtype).tiny)
    normal = normal / per_sample(largest, normal)
    normal = torch.where(per_sample(gap < 0, normal), -normal, normal)
    gap, weight, sign = gap.abs() / largest, normal.abs(), normal.sign()
    room = None
    if box.low is not None and box.high is not None:
        room = torch.where(normal > 0, box.high - points, points - box.low)
    time = torch.zeros_like(gap)
    for _ in range(NEWTON_STEPS):
        way = per_sample(time, normal) if norm == "linf" else per_sample(time, normal) * weight
        free = weight if room is None else weight * (way < room)
        moved = way if room is None else torch.minimum(way, room)
        slope = _sum(free if norm == "linf" else free * weight)
        rest = gap - _sum(weight * moved)
        forward = torch.where(slope > 0, rest / slope, 0).clamp_min(0)
        if not bool((forward > 1e-6 * time).any()):
            break
        time = time + forward
        if room is None:
            break
    moved = per_sample(time, normal) if norm == "linf" else per_sample(time, normal) * weight
    return sign * (moved if room is None else torch.minimum(moved, room))


def _sum(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)

"""Norm balls of perturbations: sampling, steepest ascent and projection, for inputs of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest

Radius = float | Tensor
"""A radius for all samples, or one each, ``(N,)``; in data units."""


def rows(values: Tensor) -> Tensor:
    """``(N, ...)`` as a matrix with a row for each sample, ``(N, D)``, also for N = 0, as a rank may have it."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(N,)`` to ``(N, 1, ..., 1)`` so that it broadcasts against ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def random_uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1) in the shape and dtype and on the device of ``like``, drawn on the generator's device."""
    return torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def random_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise in the shape and dtype and on the device of ``like``, drawn on the generator's device."""
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _linf_uniform(like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    return random_uniform(like, generator).mul_(2).sub_(1).mul_(eps)


def _linf_steepest(gradient: Tensor) -> Tensor:
    return gradient.sign_()


def _linf_project(delta: Tensor, eps: Radius) -> Tensor:
    if not isinstance(eps, Tensor):
        return delta.clamp(-eps, eps)
    limit = per_sample(eps, delta)
    return torch.clamp(delta, -limit, limit)


def _linf_length(delta: Tensor) -> Tensor:
    return rows(delta).abs().amax(1)


def _l2_length(delta: Tensor) -> Tensor:
    return rows(delta).norm(dim=1)


def _l2_uniform(like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    direction = _l2_steepest(random_normal(like, generator))
    # The radius u^(1/d) makes the point uniform in the ball; a uniform radius would favour the centre.
    radius = random_uniform(like.new_empty(len(like)), generator) ** (1 / math.prod(like.shape[1:]))
    return direction * per_sample(radius, like) * eps


def _l2_steepest(gradient: Tensor) -> Tensor:
    # Divide by the largest entry first: the squares of tiny gradients would underflow.
    largest = per_sample(_linf_length(gradient), gradient)
    gradient = gradient.div_(largest.clamp_min(torch.finfo(gradient.dtype).tiny))
    return gradient.div_(per_sample(_l2_length(gradient), gradient).clamp_min(1e-12))


def _l2_project(delta: Tensor, eps: Radius) -> Tensor:
    length = _l2_length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * per_sample((eps / length).clamp(max=1.0), delta)


L1_SHARE = 0.01
"""Share of the coordinates that one step in L1 moves (Tramer and Boneh, 2019). The steepest direction moves a single one, too few."""

REACH = 10
"""How many times as many coordinates a step in L1 may move where the box stops some of them."""


def _l1_length(delta: Tensor) -> Tensor:
    return rows(delta).abs().sum(1)


def _l1_uniform(like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    # Exponential variables over their sum are uniform on the simplex; one more than there are coordinates fills the ball.
    sizes = random_uniform(like.new_empty(len(like), math.prod(like.shape[1:]) + 1), generator).neg_().log1p_().neg_()
    sizes = sizes[:, 1:] / sizes.sum(1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
    return sizes.reshape(like.shape) * random_uniform(like, generator).sub_(0.5).sign_() * eps


def _l1_steepest(gradient: Tensor) -> Tensor:
    return l1_step(gradient, 1.0)


def l1_step(gradient: Tensor, length: Radius, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """A step of ascent of L1 norm ``length`` that stays inside a box: as far as possible in the coordinates of the largest slopes.

    No coordinate moves by more than the length divided by 1% of their number. Where the box stops one, the next in order moves too.

    Args:
        gradient: ``(N, ...)``.
        length: for all samples, or ``(N,)``.
        low: the way to the lower limits ``(N, ...)``, not positive; ``None`` for no limit.
        high: the way to the upper limits ``(N, ...)``, not negative; ``None`` for no limit.
    """
    slopes = rows(gradient)
    spread = max(1, round(L1_SHARE * slopes.shape[1]))
    if low is None or high is None:
        room = torch.full_like(slopes, torch.inf)
    else:
        room = torch.where(gradient > 0, high, -low).reshape(slopes.shape).clamp_min(0)
    worth = slopes.abs() * (room > 0)
    steepest, order = worth.topk(min(REACH * spread, slopes.shape[1]), dim=1)
    total = (length.unsqueeze(1) if isinstance(length, Tensor) else slopes.new_full((1, 1), length)).to(slopes.dtype)
    most = torch.minimum(room.gather(1, order), total / spread) * (steepest > 0)
    moved = torch.minimum(most, (total - (most.cumsum(1) - most)).clamp_min(0))
    return torch.zeros_like(slopes).scatter(1, order, moved * slopes.gather(1, order).sign()).reshape(gradient.shape)


def l1_project(delta: Tensor, eps: Radius, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Project onto the L1 ball of radius ``eps`` and the box ``[low, high]`` together: the nearest point of both.

    The result is ``sign(delta) * min(max(|delta| - s, 0), room)``, where ``room`` is the way to the box's limit in the direction of
    ``delta``. Its L1 norm is piecewise linear in the shift ``s``, so the shift is found exactly, by sorting the kinks.

    Args:
        delta: ``(N, ...)``.
        eps: radius, for all samples or ``(N,)``.
        low: ``(N, ...)``, not positive; ``None`` for no limit.
        high: ``(N, ...)``, not negative; ``None`` for no limit.

    References:
        Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.
    """
    size = rows(delta).abs().to(widest(delta.device))
    room = torch.full_like(size, torch.inf)
    if low is not None and high is not None:
        room = torch.where(delta > 0, high, -low).reshape(size.shape).clamp_min(0).to(size.dtype)
    radius = torch.as_tensor(eps, dtype=size.dtype, device=size.device).expand(len(size))
    far = (torch.minimum(size, room).sum(1) > radius).nonzero().squeeze(1)
    shift = size.new_zeros(len(size))
    if len(far):
        shift[far] = _shift(size[far], room[far], radius[far])
    moved = torch.minimum((size - shift.unsqueeze(1)).clamp_min(0), room)
    return moved.to(delta.dtype).reshape(delta.shape).copysign(delta)


def _shift(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """The shift ``s`` at which the sum of ``min(max(size - s, 0), room)`` is the radius."""
    # From large to small shifts, the sum grows from 0. A coordinate begins to grow at its size, and stops where it has no room left.
    starts, stops = size, (size - room).clamp_min(0)
    kinks, order = torch.cat([starts, stops], 1).sort(1, descending=True)
    growing = torch.cat([torch.ones_like(starts), -torch.ones_like(stops)], 1).gather(1, order).cumsum(1)
    sums = torch.cat([torch.zeros_like(kinks[:, :1]), (growing[:, :-1] * -kinks.diff(dim=1)).cumsum(1)], 1)
    after = torch.searchsorted(sums, radius.unsqueeze(1)).clamp_max(sums.shape[1] - 1)
    excess = (sums.gather(1, after).squeeze(1) - radius).clamp_min(0)
    slope = growing.gather(1, (after - 1).clamp_min(0)).squeeze(1).clamp_min(1)
    return kinks.gather(1, after).squeeze(1) + excess / slope


class Ball(NamedTuple):
    """The operations of a norm ball around zero that attacks need; all lengths are in data units.

    Attributes:
        uniform: ``(like, eps, generator)`` to uniform noise in the ball of radius ``eps``.
        steepest: gradient ``(N, ...)`` to the direction of steepest ascent of norm 1; in L1 along the 1% largest entries. It
            overwrites the gradient, because new tensors cost as much time as the arithmetic.
        project: ``(delta, eps)`` to the projection of ``delta`` onto the ball of radius ``eps``, one for all samples or ``(N,)``.
        length: ``delta`` ``(N, ...)`` to the norm of each sample, ``(N,)``.
        dual: gradient ``(N, ...)`` to the dual norm of each sample, ``(N,)``: the largest slope along a direction of norm 1.
    """

    uniform: Callable[[Tensor, float, torch.Generator], Tensor]
    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Radius], Tensor]
    length: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


BALLS = {
    "linf": Ball(_linf_uniform, _linf_steepest, _linf_project, _linf_length, dual=_l1_length),
    "l2": Ball(_l2_uniform, _l2_steepest, _l2_project, _l2_length, dual=_l2_length),
    "l1": Ball(_l1_uniform, _l1_steepest, l1_project, _l1_length, dual=_linf_length),
}

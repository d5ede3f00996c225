"""Norm balls of perturbations: sampling, steepest ascent and projection, for inputs of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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


def _linf_project(delta: Tensor, eps: float) -> Tensor:
    return delta.clamp(-eps, eps)


def _linf_length(delta: Tensor) -> Tensor:
    return delta.reshape(len(delta), -1).abs().amax(1)


def _l2_length(delta: Tensor) -> Tensor:
    return delta.reshape(len(delta), -1).norm(dim=1)


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


def _l2_project(delta: Tensor, eps: float) -> Tensor:
    length = _l2_length(delta).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * per_sample((eps / length).clamp(max=1.0), delta)


class Ball(NamedTuple):
    """The operations of a norm ball around zero that attacks need; all lengths are in data units.

    Attributes:
        uniform: ``(like, eps, generator)`` to uniform noise in the ball of radius ``eps``.
        steepest: gradient ``(N, ...)`` to the direction of steepest ascent of norm 1. It overwrites the gradient,
            because new tensors cost as much time as the arithmetic.
        project: ``(delta, eps)`` to the projection of ``delta`` onto the ball of radius ``eps``.
        length: ``delta`` ``(N, ...)`` to the norm of each sample, ``(N,)``.
    """

    uniform: Callable[[Tensor, float, torch.Generator], Tensor]
    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]
    length: Callable[[Tensor], Tensor]


BALLS = {
    "linf": Ball(_linf_uniform, _linf_steepest, _linf_project, _linf_length),
    "l2": Ball(_l2_uniform, _l2_steepest, _l2_project, _l2_length),
}

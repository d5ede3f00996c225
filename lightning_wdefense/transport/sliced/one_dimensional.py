"""Optimal transport in one dimension by sorting: the mass at each quantile moves to the same quantile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest


class Coupling(NamedTuple):
    """A coupling in one dimension: ``S`` pieces of mass for each line, in the order of the quantiles.

    Attributes:
        source: rank of the point of ``x`` from which a piece moves, ``(S,)`` or ``(B, K, S)``.
        target: rank of the point of ``y`` to which it moves, of the same shape.
        mass: mass of the piece, of the same shape; it carries the gradient of the weights.
    """

    source: Tensor
    target: Tensor
    mass: Tensor


def costs_of_lines(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """``W_p^p`` on each line, in units of a scale to the power ``p``.

    The scale is the largest distance over which mass moves on any line of a problem, so that powers neither overflow nor underflow.
    It is a constant for the gradient, because the product ``scale^p * cost`` does not depend on it.

    Args:
        x: positions ``(B, K, N)`` on ``K`` lines.
        y: positions ``(B, K, M)``.
        a: weights ``(B, N)``; ``None``, like ``b``, if both clouds are uniform.
        b: weights ``(B, M)``, scaled to the mass of ``a``.
        p: power of the distance.

    Returns:
        Costs ``(B, K)`` and scales ``(B,)``.
    """
    x, rank_x = torch.sort(x, dim=-1, stable=True)
    y, rank_y = torch.sort(y, dim=-1, stable=True)
    if a is None or b is None:
        coupling = _uniform(x.shape[-1], y.shape[-1], x)
    else:
        lines = x.shape[:-1]
        coupling = _weighted(
            a.unsqueeze(1).expand(*lines, -1).gather(-1, rank_x), b.unsqueeze(1).expand(*lines, -1).gather(-1, rank_y)
        )
    distances = (_pick(x, coupling.source) - _pick(y, coupling.target)).abs()
    scale = (distances * (coupling.mass > 0)).detach().amax((-2, -1))
    scale = torch.where(scale > 0, scale, 1.0)
    relative = distances / scale[:, None, None]
    powers = relative if p == 1 else relative.square() if p == 2 else relative.pow(p)
    return (coupling.mass * powers).sum(-1), scale


def _uniform(n: int, m: int, like: Tensor) -> Coupling:
    """The coupling of uniform weights, the same for all lines. Quantile levels are integers in units of ``1 / nm``."""
    of_x = m * torch.arange(1, n + 1, device=like.device)
    of_y = n * torch.arange(1, m + 1, device=like.device)
    levels = of_x if n == m else torch.cat([of_x, of_y]).unique()
    lengths = levels.diff(prepend=levels.new_zeros(1))
    return Coupling((levels - 1) // m, (levels - 1) // n, lengths.to(like.dtype) / (n * m))


def _weighted(a: Tensor, b: Tensor) -> Coupling:
    """The coupling of weights ``(B, K, N)`` and ``(B, K, M)``, which are in the order of their sorted points.

    Ranks are counted along the merged quantile levels, not searched. Where levels are equal (as with zero weights), the ranks then
    still increase one by one, so the gradient with respect to the weights is a dual potential.
    """
    n, m = a.shape[-1], b.shape[-1]
    # In float32, levels that should be equal differ by 1e-7; the square root of that would be visible for equal clouds.
    dtype = widest(a.device)
    levels_x, levels_y = a.cumsum(-1, dtype=dtype), b.cumsum(-1, dtype=dtype)
    levels_y = levels_y * (levels_x[..., -1:] / levels_y[..., -1:])
    levels, order = torch.sort(torch.cat([levels_x, levels_y], -1), dim=-1, stable=True)
    ends_x = (order < n).long()
    ends_y = 1 - ends_x
    source, target = ends_x.cumsum(-1) - ends_x, ends_y.cumsum(-1) - ends_y
    mass = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    return Coupling(source.clamp(max=n - 1), target.clamp(max=m - 1), mass.to(a.dtype))


def _pick(points: Tensor, ranks: Tensor) -> Tensor:
    if ranks.ndim == points.ndim:
        return points.gather(-1, ranks)
    return points if len(ranks) == points.shape[-1] else points.index_select(-1, ranks)

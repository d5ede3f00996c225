"""Optimal transport on a line, where sorting solves it: the mass at each quantile goes to the same quantile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coupling(NamedTuple):
    """Pieces of mass that move as one, in the order of the quantiles: ``S`` of them for each line.

    Attributes:
        source: rank of the point of ``x`` that a piece comes from, ``(S,)`` or ``(B, K, S)``.
        target: rank of the point of ``y`` that it goes to, likewise.
        mass: of the piece, likewise; it carries the gradient of the weights.
    """

    source: Tensor
    target: Tensor
    mass: Tensor


def costs_of_lines(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """``W_p^p`` on each line, in units of a scale to the power ``p``.

    The scale is the farthest that mass moves on any line of a problem, so that powers neither overflow nor vanish. It is a
    constant for the gradient: the product ``scale^p * cost`` does not depend on it.

    Args:
        x: positions ``(B, K, N)`` on ``K`` lines.
        y: positions ``(B, K, M)``.
        a: weights ``(B, N)``, or ``None``, like ``b``, if both clouds are uniform.
        b: weights ``(B, M)``, which are scaled to the mass of ``a``.
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
    """One coupling for all lines, in integers: quantile levels are in units of ``1 / nm``."""
    of_x = m * torch.arange(1, n + 1, device=like.device)
    of_y = n * torch.arange(1, m + 1, device=like.device)
    levels = of_x if n == m else torch.cat([of_x, of_y]).unique()
    lengths = levels.diff(prepend=levels.new_zeros(1))
    return Coupling((levels - 1) // m, (levels - 1) // n, lengths.to(like.dtype) / (n * m))


def _weighted(a: Tensor, b: Tensor) -> Coupling:
    """The coupling of weights ``(B, K, N)`` and ``(B, K, M)`` in the order of their points.

    Ranks are counted along the merged levels, not searched for: where levels are equal (zero weights, say) the path then still
    takes one step after the other, which makes the gradient with respect to the weights a dual solution.
    """
    n, m = a.shape[-1], b.shape[-1]
    # In float32 levels that should be equal differ by 1e-7, the root of which shows where clouds are equal.
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
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

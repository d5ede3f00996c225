"""The projection direction with the largest transport cost between two clouds, by gradient ascent on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.clouds.precision import exact_matmul
from lightning_wdefense.transport.sliced.one_dimensional import costs_of_lines

STARTS = 4
"""Number of candidates from which gradient ascent starts. They can end in different local maxima."""

STEPS = 16
"""Number of steps of the gradient ascent."""

ANGLES = (0.0, *(math.pi / 4 / 2**i for i in range(8)))
"""Candidate lengths of a step along a great circle, in radians. The best one is used, so the cost never decreases."""


def costs_along(
    directions: Tensor, x: Measure, y: Measure, p: float, *, uniform: bool = False
) -> tuple[Tensor, Tensor]:
    """``W_p^p`` between the clouds' projections on unit vectors.

    Args:
        directions: unit vectors ``(1, K, D)`` or ``(B, K, D)``.
        x: the first clouds.
        y: the second clouds.
        p: power of the distance.
        uniform: whether all weights are equal.

    Returns:
        Costs ``(B, K)`` in units of ``scale^p``, and scales ``(B,)``.
    """
    lines_x, lines_y = (exact_matmul(directions, measure.points.mT) for measure in (x, y))
    a, b = (None, None) if uniform else (x.weights, y.weights)
    return costs_of_lines(lines_x, lines_y, a, b, p)


def max_direction(candidates: Tensor, x: Measure, y: Measure, p: float, *, uniform: bool) -> Tensor:
    """A local maximum of the transport cost over directions, ``(B, 1, D)`` without a graph.

    Gradient ascent starts from the best of the candidates ``(1, K, D)`` and of the difference between the means.
    """
    # Gradients are needed here in every mode of the caller, and tensors made in inference mode have none, so they are cloned.
    with torch.inference_mode(False), torch.no_grad():
        x, y = (Measure(m.points.clone(), m.weights.clone(), None) for m in (x, y))
        shift = x.mean() - y.mean()
        shift = F.normalize(shift / shift.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(shift.dtype).tiny), dim=-1)
        candidates = torch.cat([candidates.clone().expand(len(shift), -1, -1), shift], 1)
        at = _best(candidates, x, y, p, uniform, min(STARTS, candidates.shape[1]))
        angles = torch.tensor(ANGLES, dtype=at.dtype, device=at.device).unsqueeze(-1)
        for _ in range(STEPS):
            with torch.enable_grad():
                here = at.clone().requires_grad_()
                cost, _ = costs_along(here, x, y, p, uniform=uniform)
                (gradient,) = torch.autograd.grad(cost.sum(), here)
            ascent = F.normalize(gradient - (gradient * at).sum(-1, keepdim=True) * at, dim=-1)
            path = F.normalize(angles.cos() * at.unsqueeze(2) + angles.sin() * ascent.unsqueeze(2), dim=-1)
            costs, _ = costs_along(path.flatten(1, 2), x, y, p, uniform=uniform)
            at = _take(path, costs.unflatten(1, path.shape[1:3]).argmax(-1, keepdim=True)).squeeze(2)
        return _best(at, x, y, p, uniform, 1)


def _best(directions: Tensor, x: Measure, y: Measure, p: float, uniform: bool, k: int) -> Tensor:
    costs, _ = costs_along(directions, x, y, p, uniform=uniform)
    return _take(directions, costs.topk(k, -1).indices)


def _take(directions: Tensor, indices: Tensor) -> Tensor:
    """The directions ``(..., I, D)`` at indices ``(..., I)`` of ``(..., K, D)``."""
    return directions.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, directions.shape[-1]))

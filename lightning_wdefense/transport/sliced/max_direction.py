"""The direction in which two clouds are farthest apart, by gradient ascent on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.clouds.precision import exact_matmul
from lightning_wdefense.transport.sliced.one_dimensional import costs_of_lines

STARTS = 4
"""Candidates that an ascent starts from, side by side; they end in different maxima."""

STEPS = 16
"""Steps of the ascent."""

ANGLES = (0.0, *(math.pi / 4 / 2**i for i in range(8)))
"""How far along the great circle a step may go. The best is taken, so that the cost never falls."""


def costs_along(
    directions: Tensor, x: Measure, y: Measure, p: float, *, uniform: bool = False
) -> tuple[Tensor, Tensor]:
    """``W_p^p`` of the clouds projected on unit vectors ``(1 or B, K, D)``: costs ``(B, K)`` in units of scales ``(B,)``."""
    lines_x, lines_y = (exact_matmul(directions, measure.points.mT) for measure in (x, y))
    a, b = (None, None) if uniform else (x.weights, y.weights)
    return costs_of_lines(lines_x, lines_y, a, b, p)


def max_direction(candidates: Tensor, x: Measure, y: Measure, p: float, *, uniform: bool) -> Tensor:
    """A local maximum of the transport cost over directions, ``(B, 1, D)`` without a graph.

    Ascents start from the best few of the candidates ``(1, K, D)`` and the difference between the means.
    """
    # Gradients are needed here whatever the mode outside; of tensors made in inference mode there are none.
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
            uphill = F.normalize(gradient - (gradient * at).sum(-1, keepdim=True) * at, dim=-1)
            path = F.normalize(angles.cos() * at.unsqueeze(2) + angles.sin() * uphill.unsqueeze(2), dim=-1)
            costs, _ = costs_along(path.flatten(1, 2), x, y, p, uniform=uniform)
            at = _take(path, costs.unflatten(1, path.shape[1:3]).argmax(-1, keepdim=True)).squeeze(2)
        return _best(at, x, y, p, uniform, 1)


def _best(directions: Tensor, x: Measure, y: Measure, p: float, uniform: bool, k: int) -> Tensor:
    costs, _ = costs_along(directions, x, y, p, uniform=uniform)
    return _take(directions, costs.topk(k, -1).indices)


def _take(directions: Tensor, indices: Tensor) -> Tensor:
    """Some directions ``(..., I, D)`` of each row of ``(..., K, D)``, by indices ``(..., I)``."""
    return directions.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, directions.shape[-1]))

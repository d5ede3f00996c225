"""The direction in which two clouds are farthest apart, by gradient ascent on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.measures import Measure
from lightning_wdefense.transport.one_dimensional import costs_of_lines
from lightning_wdefense.transport.precision import exact_matmul

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

    The ascent starts from the best of the candidates ``(1, K, D)`` and of the difference between the means.
    """
    # Gradients are needed here whatever the mode outside; of tensors made in inference mode there are none.
    with torch.inference_mode(False), torch.no_grad():
        x, y = (Measure(m.points.clone(), m.weights.clone(), None) for m in (x, y))
        shift = _mean(x) - _mean(y)
        shift = F.normalize(shift / shift.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(shift.dtype).tiny), dim=-1)
        best = _best(torch.cat([candidates.clone().expand(len(shift), -1, -1), shift], 1), x, y, p, uniform)
        angles = torch.tensor(ANGLES, dtype=best.dtype, device=best.device).unsqueeze(-1)
        for _ in range(STEPS):
            with torch.enable_grad():
                here = best.clone().requires_grad_()
                cost, _ = costs_along(here, x, y, p, uniform=uniform)
                (gradient,) = torch.autograd.grad(cost.sum(), here)
            uphill = F.normalize(gradient - (gradient * best).sum(-1, keepdim=True) * best, dim=-1)
            best = _best(F.normalize(angles.cos() * best + angles.sin() * uphill, dim=-1), x, y, p, uniform)
    return best


def _mean(measure: Measure) -> Tensor:
    weights = measure.weights / measure.weights.sum(-1, keepdim=True)
    return (weights.unsqueeze(-1) * measure.points).sum(-2, keepdim=True)


def _best(directions: Tensor, x: Measure, y: Measure, p: float, uniform: bool) -> Tensor:
    costs, _ = costs_along(directions, x, y, p, uniform=uniform)
    index = costs.argmax(-1)[:, None, None].expand(-1, 1, directions.shape[-1])
    return directions.gather(1, index)

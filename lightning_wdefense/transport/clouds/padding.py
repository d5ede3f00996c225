"""Points of weight zero, which pad a tensor and belong to no cloud."""

from __future__ import annotations

import torch
from torch import Tensor


def contained(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, own_cost: bool, padded: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The clouds with their points of weight zero moved among the others, so that results are as accurate as without them.

    What has no weight has no part in the transport, but products with NaN, infinite or very large values spoil what has. Where it
    lies decides only how the value depends on its weight: so it stays where it is in the box that all points with weight span, and
    comes to the nearest place in the box from outside.

    Args:
        x: points ``(..., N, D)``; those with weight are finite.
        y: points ``(..., M, D)``, likewise.
        a: weights ``(..., N)``.
        b: weights ``(..., M)``.
        own_cost: whether the cost is the caller's, which may not be finite at such a place, or not have a gradient there. Then each is
            put on a point with weight.
        padded: whether there may be points of weight zero; ``None`` looks, for which the host has to wait for a GPU.
    """
    if padded is None:
        padded = bool((a == 0).any()) or bool((b == 0).any())
    if not padded:
        return x, y
    if own_cost:
        boxes = [(heaviest, heaviest) for heaviest in (_heaviest(x, a), _heaviest(y, b))]
    else:
        (low, high), (other_low, other_high) = _box(x, a), _box(y, b)
        boxes = [(torch.minimum(low, other_low), torch.maximum(high, other_high))] * 2
    (x, y) = (_brought_in(*each) for each in zip((x, y), (a, b), boxes, strict=True))
    return x, y


def _brought_in(points: Tensor, weights: Tensor, box: tuple[Tensor, Tensor]) -> Tensor:
    places = points.detach().nan_to_num().clamp(*box)
    return torch.where((weights == 0).unsqueeze(-1) & (places != points), places, points)


def _box(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest coordinates ``(..., 1, D)`` of the points with weight."""
    points, weighty = points.detach(), (weights > 0).unsqueeze(-1)
    low, high = (torch.where(weighty, points, infinity) for infinity in (torch.inf, -torch.inf))
    return low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)


def _heaviest(points: Tensor, weights: Tensor) -> Tensor:
    """The point of the largest weight, ``(..., 1, D)``."""
    return points.detach().take_along_dim(weights.argmax(-1)[..., None, None], -2)

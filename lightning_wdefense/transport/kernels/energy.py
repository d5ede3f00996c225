"""The energy distance between two samples, for any pairwise distance."""

from __future__ import annotations

import torch
from torch import Tensor


def euclidean_distances(points: Tensor) -> Tensor:
    """Euclidean distances ``(N, N)`` between points ``(N, D)``, without the rounding errors of matrix products."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def energy_distances(distances: Tensor, orders: Tensor, n: int) -> Tensor:
    """Energy distances ``2 E d(x, y) - E d(x, x') - E d(y, y')`` for several ways to divide a pooled sample in two.

    For Euclidean distances ``d`` this is the energy distance. For the negative of a kernel it is the squared maximum mean
    discrepancy.

    Args:
        distances: distances ``(N + M, N + M)`` between all points of the pooled sample.
        orders: permutations ``(B, N + M)`` of the points; the first ``n`` points of each are ``x``.
        n: size of the first sample.

    Returns:
        ``(B,)``, not negative, in units of ``distances``.
    """
    m = orders.shape[1] - n
    signs = distances.new_full(orders.shape, -1 / m).scatter(1, orders[:, :n], 1 / n)
    values = -((signs @ distances) * signs).sum(1)
    # Negative values are rounding errors. Values as small as rounding errors, as of equal samples, are set to 0.
    return values.where(values > 16 * torch.finfo(values.dtype).eps * distances.abs().amax(), values.new_zeros(()))

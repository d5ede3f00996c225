"""The energy distance, and other contrasts of distances between two samples with those within them."""

from __future__ import annotations

import torch
from torch import Tensor


def euclidean_distances(points: Tensor) -> Tensor:
    """Distances ``(N, N)`` between points ``(N, D)``, without the rounding of products."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def energy_distances(distances: Tensor, orders: Tensor, n: int) -> Tensor:
    """``2 E d(x, y) - E d(x, x') - E d(y, y')`` for each way to divide a pooled sample in two: ``(B,)``.

    It is the energy distance for Euclidean distances, and the squared maximum mean discrepancy for minus a kernel.

    Args:
        distances: ``(N + M, N + M)`` between all points.
        orders: permutations of the points ``(B, N + M)``, of which the first ``n`` are ``x``.
        n: size of the first sample.
    """
    m = orders.shape[1] - n
    signs = distances.new_full(orders.shape, -1 / m).scatter(1, orders[:, :n], 1 / n)
    values = -((signs @ distances) * signs).sum(1)
    # Never negative but by rounding; and what rounding leaves of equal samples is not to be compared.
    return values.where(values > 16 * torch.finfo(values.dtype).eps * distances.abs().amax(), values.new_zeros(()))

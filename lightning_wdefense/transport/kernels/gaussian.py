"""The maximum mean discrepancy (MMD) with a mean of Gaussian kernels."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Squared bandwidths of the Gaussian kernels, in units of the mean squared distance between points."""


def multiscale_kernel(points: Tensor) -> Tensor:
    """Mean ``(N, N)`` of five Gaussian kernels ``exp(-|x - y|^2 / bandwidth^2)`` (Long et al., 2015).

    The squared bandwidths are 1/4, 1/2, 1, 2 and 4 times the mean squared distance between the points, which is a constant for the
    gradient.

    Args:
        points: ``(N, D)``, in float32 or better.
    """
    products = points @ points.T
    lengths = products.diagonal()
    distances = (lengths.unsqueeze(0) + lengths.unsqueeze(1) - 2 * products).clamp_min(0)
    bandwidth = distances.detach().mean().clamp_min(torch.finfo(points.dtype).tiny)
    return torch.stack([(-distances / (scale * bandwidth)).exp() for scale in SCALES]).mean(0)


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared MMD ``()`` between samples ``(N, D)`` and ``(M, D)``, with the :func:`multiscale_kernel` of the pooled sample."""
    kernel, n = multiscale_kernel(torch.cat([x, y])), len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()

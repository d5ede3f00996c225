"""Gaussian kernels and the maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Squared bandwidths of the kernel's parts, in units of the mean squared distance."""


def multiscale_kernel(points: Tensor) -> Tensor:
    """Mean of five Gaussian kernels ``(N, N)`` around the mean squared distance of the points (Long et al., 2015).

    Their squared bandwidths are that mean (a constant for the gradient) times 1/4, 1/2, 1, 2 and 4, without the usual factor 2.

    Args:
        points: ``(N, D)``, in float32 or better.
    """
    products = points @ points.T
    lengths = products.diagonal()
    distances = (lengths.unsqueeze(0) + lengths.unsqueeze(1) - 2 * products).clamp_min(0)
    bandwidth = distances.detach().mean().clamp_min(torch.finfo(points.dtype).tiny)
    return torch.stack([(-distances / (scale * bandwidth)).exp() for scale in SCALES]).mean(0)


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy ``()`` of samples ``(N, D)`` and ``(M, D)`` with :func:`multiscale_kernel` of both together."""
    kernel, n = multiscale_kernel(torch.cat([x, y])), len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()

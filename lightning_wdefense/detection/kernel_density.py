"""Detection by a kernel density estimate of clean features."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.detection.base import Detector, check_enough_samples, spread


class Kernels(NamedTuple):
    """Gaussian kernels around points.

    Attributes:
        points: centres ``(N, D)``.
        bandwidth: standard deviation of the kernels, in units of the points.
    """

    points: Tensor
    bandwidth: float


class KernelDensity(Detector):
    """Negative log density of a Gaussian kernel estimate on the clean samples of all classes.

    The paper estimates the density of the *predicted* class only. Here the nearest class dominates the sum over all classes, so the
    result is similar.

    Args:
        bandwidth: standard deviation of the kernels, in units of the features. ``None`` for Scott's rule: ``N^(-1 / (D + 4))`` times
            the square root of the mean variance of the features.

    Raises:
        ValueError: if the bandwidth is not positive and finite; in ``fit``, if there is a single sample or all samples are equal.

    References:
        Feinman et al., "Detecting adversarial samples from artifacts", 2017. Scott, "Multivariate density estimation", 1992.

    Example:
        >>> import torch
        >>> detector = KernelDensity(bandwidth=1.0).fit(torch.zeros(2, 1))
        >>> detector.score(torch.tensor([[0.0], [2.0]]))  # log sqrt(2 pi), and 2^2 / 2 more
        tensor([0.9189, 2.9189])
    """

    name: ClassVar[str] = "kernel-density"

    def __init__(self, bandwidth: float | None = None) -> None:
        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, or None for Scott's rule, got {bandwidth}.")
        self.bandwidth = bandwidth

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> Kernels:
        """Keep the clean features, and choose the bandwidth."""
        check_enough_samples(2, features, "to estimate a density")
        if self.bandwidth is not None:
            return Kernels(features, self.bandwidth)
        samples, width = features.shape
        return Kernels(features, spread(features) * samples ** (-1 / (width + 4)))

    def score_layer(self, fitted: Kernels, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of features ``(N, D)``."""
        points, bandwidth = fitted
        distances = torch.cdist(
            features / bandwidth, points / bandwidth, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        normaliser = math.log(len(points)) + points.shape[1] * (math.log(bandwidth) + 0.5 * math.log(2 * math.pi))
        return normaliser - (-0.5 * distances).logsumexp(1)

"""Detection by distances to the nearest clean samples: k-nearest neighbours and local intrinsic dimensionality."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.detection.base import Detector, check_enough_samples


def nearest_distances(points: Tensor, references: Tensor, k: int) -> Tensor:
    """Distances ``(N, k)`` of each point ``(N, D)`` to its ``k`` nearest references ``(M, D)``, in increasing order."""
    # Not by matrix products, whose rounding errors are larger than small distances.
    distances = torch.cdist(points, references, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, largest=False).values


class _Neighbors(Detector):
    """Base of the detectors that keep the clean features and search ``k`` neighbours in them."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self.k = k

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """Keep the clean features."""
        check_enough_samples(self.k, features, f"to find {self.k} neighbours")
        return features


class KNNDistance(_Neighbors):
    """Distance to the ``k``-th nearest clean sample.

    Args:
        k: rank of the neighbour, at least 1.

    Raises:
        ValueError: if ``k`` is below 1; in ``fit``, if there are fewer than ``k`` samples.

    References:
        Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022 (there on normalised features).

    Example:
        >>> import torch
        >>> KNNDistance(k=2).fit(torch.tensor([[0.0], [1.0], [5.0]])).score(torch.tensor([[0.0], [4.0]]))
        tensor([1., 3.])
    """

    name: ClassVar[str] = "knn"

    def __init__(self, k: int = 10) -> None:
        super().__init__(k)

    def score_layer(self, fitted: Tensor, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of features ``(N, D)``."""
        return nearest_distances(features, fitted, self.k)[:, -1]


class LID(_Neighbors):
    """Local intrinsic dimensionality (LID): the growth rate of the number of clean samples with the radius around a sample.

    The score is the maximum-likelihood estimate ``-1 / mean_i log(r_i / r_k)`` from the distances ``r_i`` to the ``k`` nearest clean
    samples. The paper uses neighbours from minibatches, and trains a classifier on the values of many layers. Here the neighbours
    come from all clean samples, and the values of several layers are added up.

    Args:
        k: number of neighbours, at least 2.

    Raises:
        ValueError: if ``k`` is below 2; in ``fit``, if there are fewer than ``k`` samples.

    References:
        Ma et al., "Characterizing adversarial subspaces using local intrinsic dimensionality", ICLR 2018. Amsaleg et al.,
        "Estimating local intrinsic dimensionality", KDD 2015.

    Example:
        >>> import torch
        >>> square = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(LID(k=500).fit(square).score(torch.full((1, 2), 0.5)).item(), 1)
        2.0
    """

    name: ClassVar[str] = "lid"

    def __init__(self, k: int = 20) -> None:
        if k < 2:
            raise ValueError(f"k must be at least 2, got {k}: one distance gives no growth rate.")
        super().__init__(k)

    def score_layer(self, fitted: Tensor, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of features ``(N, D)``."""
        # A sample that is one of the clean samples has a neighbour at distance 0.
        logs = nearest_distances(features, fitted, self.k).clamp_min(torch.finfo(features.dtype).tiny).log()
        growth = (logs[:, -1:] - logs).mean(1)
        return 1 / growth.clamp_min(torch.finfo(features.dtype).eps)

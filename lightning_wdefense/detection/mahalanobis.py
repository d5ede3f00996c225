"""Distance to the nearest class, measured by the spread within classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_wdefense.detection.base import Detector, spread


class ClassGaussians(NamedTuple):
    """Gaussians with one covariance, in coordinates where that is the identity.

    Attributes:
        means: of the classes, ``(K, D)``, in whitened coordinates.
        centre: of all samples, ``(D,)``, subtracted before whitening.
        whitening: ``(D, D)``; rows ``x`` become ``(x - centre) @ whitening``.
    """

    means: Tensor
    centre: Tensor
    whitening: Tensor


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    The covariance of the deviations from the class means is that of Ledoit and Wolf (shrunk towards a multiple of the identity), so it
    can be inverted with fewer samples than features or with units that are always off. Given several layers, their distances
    are added up, as in the paper with equal weights. Needs labels, and scikit-learn.

    Raises:
        ValueError: in ``fit``, without labels, if a class has fewer than 2 samples, or if all samples are equal.
        ModuleNotFoundError: if scikit-learn is not installed.

    References:
        Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks", NeurIPS
        2018. Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.

    Example:
        >>> import torch
        >>> clean = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(400) % 2
        >>> detector = Mahalanobis().fit(clean + 10 * labels[:, None], labels)
        >>> near, between = detector.score(torch.tensor([[10.0, 10.0, 10.0], [5.0, 5.0, 5.0]]))
        >>> bool(near < 1), bool(between > 50)
        (True, True)
    """

    name: ClassVar[str] = "mahalanobis"

    def __init__(self) -> None:
        _scikit_learn()  # what is missing should be missed before a model is trained

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> ClassGaussians:
        """The classes' means and their common covariance."""
        if labels is None:
            raise ValueError("Mahalanobis measures the distance to class means: call fit(features, labels).")
        # On the CPU, where scikit-learn computes, and where all devices can go for float64.
        points, labels = features.cpu().double(), labels.cpu()
        _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
        if int(counts.min()) < 2:
            few = labels.unique()[counts < 2].tolist()
            raise ValueError(f"Each class needs at least 2 clean samples to show its spread; classes {few} have fewer.")
        sums = points.new_zeros(len(counts), points.shape[1]).index_add(0, classes, points)
        means = sums / counts.unsqueeze(1)
        deviations = (points - means[classes]).numpy()
        covariance = torch.from_numpy(_scikit_learn()(deviations, assume_centered=True)[0])
        scale, directions = torch.linalg.eigh(covariance)
        # Where classes have no spread at all, whatever is not a class mean is far, but not infinitely.
        scale = scale.clamp_min(torch.finfo(features.dtype).eps * spread(points) ** 2)
        whitening, centre = directions / scale.sqrt(), points.mean(0)
        fitted = ((means - centre) @ whitening, centre, whitening)
        return ClassGaussians(*(each.to(features) for each in fitted))

    def score_layer(self, fitted: ClassGaussians, features: Tensor) -> Tensor:
        """Scores ``(N,)``."""
        whitened = (features - fitted.centre) @ fitted.whitening
        return torch.stack([(whitened - mean).square().sum(1) for mean in fitted.means]).amin(0)


def _scikit_learn() -> Callable[..., tuple[np.ndarray, float]]:
    try:
        from sklearn.covariance import ledoit_wolf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Mahalanobis needs scikit-learn. Install it with `pip install "lightning-wdefense[detection]"`.'
        ) from error
    return ledoit_wolf

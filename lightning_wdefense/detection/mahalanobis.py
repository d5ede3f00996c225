"""Detection by the Mahalanobis distance to the nearest class mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_wdefense.detection.base import Detector, spread


class ClassGaussians(NamedTuple):
    """Gaussian distributions with a common covariance, in whitened coordinates, where the covariance is the identity.

    Attributes:
        means: class means ``(K, D)``, in whitened coordinates.
        centre: mean of all samples, ``(D,)``, subtracted before whitening.
        whitening: whitening matrix ``(D, D)``: a row ``x`` becomes ``(x - centre) @ whitening``.
    """

    means: Tensor
    centre: Tensor
    whitening: Tensor


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    The covariance of the deviations from the class means is estimated by the method of Ledoit and Wolf (shrinkage towards a multiple
    of the identity). So it can be inverted even with fewer samples than features, or with constant features. The distances of
    several layers are added up, as in the paper with equal weights. Needs labels, and scikit-learn.

    Raises:
        ValueError: in ``fit``, if there are no labels, a class has fewer than 2 samples, or all samples are equal.
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
        _scikit_learn()  # a missing package should be an error before a model is trained

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> ClassGaussians:
        """Class means and the common covariance, as whitened Gaussians."""
        if labels is None:
            raise ValueError(
                "Mahalanobis needs labels, because it measures distances to class means: call fit(features, labels)."
            )
        # On the CPU, because scikit-learn computes there, and because some devices have no float64.
        points, labels = features.cpu().double(), labels.cpu()
        _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
        if int(counts.min()) < 2:
            few = labels.unique()[counts < 2].tolist()
            raise ValueError(f"Each class needs at least 2 clean samples for its covariance; classes {few} have fewer.")
        sums = points.new_zeros(len(counts), points.shape[1]).index_add(0, classes, points)
        means = sums / counts.unsqueeze(1)
        deviations = (points - means[classes]).numpy()
        covariance = torch.from_numpy(_scikit_learn()(deviations, assume_centered=True)[0])
        scale, directions = torch.linalg.eigh(covariance)
        # In directions without any variance within classes, distances are large but finite.
        scale = scale.clamp_min(torch.finfo(features.dtype).eps * spread(points) ** 2)
        whitening, centre = directions / scale.sqrt(), points.mean(0)
        fitted = ((means - centre) @ whitening, centre, whitening)
        return ClassGaussians(*(each.to(features) for each in fitted))

    def score_layer(self, fitted: ClassGaussians, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of features ``(N, D)``."""
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

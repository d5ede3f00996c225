"""Gaussian smoothing: a randomised classifier with a certificate of robustness in the L2 distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.norms import random_normal
from lightning_wdefense.defenses.smoothing.base import RandomizedSmoothing


@dataclass(frozen=True)
class GaussianSmoothing(RandomizedSmoothing):
    r"""Randomised smoothing with Gaussian noise, and its certificate in the L2 distance.

    The smoothed classifier predicts the class that is most frequent over copies of the input with independent Gaussian noise. If the
    noisy copies have a class with probability ``P > 1 / 2``, then this class stays the most probable one within the L2 radius
    ``sigma * Phi^-1(P)``, where ``Phi`` is the standard normal distribution function. No larger radius holds for all classifiers
    with this ``P``; a linear one meets it with equality.

    The certificate holds for the *smoothed* classifier, :meth:`predict`. For each sample, the certificate is wrong with a probability
    of at most ``alpha``, and so is the prediction. The base classifier should be trained on noisy inputs, :meth:`noisy`. Certified
    radii are lower bounds of the distances to the nearest misclassified input, so
    :func:`~lightning_wdefense.metrics.distributional_accuracy` makes a certified curve of them.

    Args:
        sigma: standard deviation of the noise, in data units; 0.12 to 1 in the paper, for images in [0, 1].
        threat: gives the mean and std that convert model units to data units; its norm, eps and bounds are not used. ``None`` for
            inputs in data units.
        samples: number of noisy copies of each sample that estimate the probabilities.
        selection: number of additional noisy copies from which :meth:`certify` chooses the class.
        alpha: error probability of each certificate and prediction.
        batch_size: number of samples in one forward pass.
        seed: seed of the noise for calls without a generator.

    Raises:
        ValueError: if a setting is out of its range; in the methods, if the inputs are not ``(N, ...)`` or not finite.

    References:
        Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # class 1 where the first value is positive
        >>> classes, radii = GaussianSmoothing(sigma=0.5).certify(model, torch.tensor([[0.4, 7.0]]))
        >>> classes.item(), 0.35 < radii.item() <= 0.4  # the distance to the boundary is 0.4
        (1, True)
    """

    unit: ClassVar[str] = "data units"

    sigma: float = 0.25

    def radius(self, probability: Tensor) -> Tensor:
        """Certified radius for (a lower bound of) the probability of a class under noise; 0 for probabilities up to 1 / 2.

        Args:
            probability: of any shape, from 0 to 1.

        Returns:
            Radii of the same shape: L2 distances in data units.
        """
        return (self.sigma * torch.special.ndtri(probability)).clamp(min=0.0)

    def _check(self, data: Tensor, dtype: torch.dtype) -> None:
        if not bool(data.isfinite().all()):
            raise ValueError("The inputs hold NaN or infinite values, which cannot be smoothed.")

    def _perturb(self, data: Tensor, generator: torch.Generator) -> Tensor:
        return data + self.sigma * random_normal(data, generator)

"""Wasserstein smoothing: a randomised classifier with a certificate of robustness in the 1-Wasserstein distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.defenses.smoothing.base import RandomizedSmoothing
from lightning_wdefense.defenses.smoothing.flows import apply_flow, laplace_noise

Ground = Literal["euclidean", "manhattan"]


@dataclass(frozen=True)
class WassersteinSmoothing(RandomizedSmoothing):
    r"""Randomised smoothing with random flows of pixel mass, and its certificate in the 1-Wasserstein distance.

    An image is normalised to mass 1. Random flows move Laplace-distributed amounts of mass between neighbouring pixels, horizontally
    and vertically. The smoothed classifier predicts the class that is most frequent over such noisy copies of the image.

    Any other image of the same mass is the original image after a shift of the flows. The smallest L1 norm of such a shift is the
    1-Wasserstein distance with Manhattan ground distance. A shift of norm ``r`` changes the log probability of any event by at most
    ``r / b``, where ``b = sigma / sqrt(2)``. If a share ``1 - q > 1 / 2`` of the noisy images has one class, then this class stays
    the most probable one within the certified radius ``b log(1 / 2q)``. This is tighter than the radius in the paper,
    ``b / 2 log((1 - q) / q)``, for the same probabilities.

    The certificate holds for the *smoothed* classifier, :meth:`predict`. For each image, the certificate is wrong with a probability
    of at most ``alpha``, and so is the prediction. The base classifier should be trained on noisy images, :meth:`noisy`.

    Args:
        sigma: standard deviation of the flows, in shares of an image's mass; 0.005 to 0.5 in the paper.
        threat: gives the mean and std that convert model units to data units; its norm, eps and bounds are not used. ``None`` for
            inputs in data units.
        samples: number of noisy copies of each image that estimate the probabilities.
        selection: number of additional noisy copies from which :meth:`certify` chooses the class.
        alpha: error probability of each certificate and prediction.
        batch_size: number of images in one forward pass.
        seed: seed of the noise for calls without a generator.
        ground: ground distance of the radii, ``"euclidean"`` or ``"manhattan"``. The Euclidean distance is at least ``1 / sqrt(2)``
            of the Manhattan distance, so the radius is divided by ``sqrt(2)``.

    Raises:
        ValueError: if a setting is out of its range; in the methods, if the inputs are not images ``(N, C, H, W)``, have negative or
            non-finite pixels (in data units), or an image has no mass.

    References:
        Levine and Feizi, "Wasserstein smoothing: certified robustness against Wasserstein adversarial attacks", AISTATS 2020.
        Lecuyer et al., "Certified robustness to adversarial examples with differential privacy", 2019 (the bound on the shift).
        Teng, Lee, Yuan, "L1 adversarial robustness certificates: a randomized smoothing approach", 2020 (the radius).
        Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019 (the procedure).

    Example:
        >>> import torch
        >>> left = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2, bias=False))
        >>> left[1].weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0] * 4, [0.0, 0.0, 0.0, 1.0] * 4])
        >>> image = torch.zeros(1, 1, 4, 4)
        >>> image[..., 0] = 1.0  # all of its mass in the first column
        >>> classes, radii = WassersteinSmoothing(sigma=0.05).certify(left, image)
        >>> classes.item(), 0.1 < radii.item() < 0.5
        (0, True)
    """

    unit: ClassVar[str] = "shares of an image's mass"

    sigma: float = 0.01
    ground: Ground = "euclidean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ground not in get_args(Ground):
            raise ValueError(unknown_name("ground distance", self.ground, get_args(Ground)))

    def radius(self, probability: Tensor) -> Tensor:
        """Certified radius for (a lower bound of) the probability of a class under noise; 0 for probabilities up to 1 / 2.

        Args:
            probability: of any shape, from 0 to 1.

        Returns:
            Radii of the same shape: 1-Wasserstein distances between images of mass 1, in shares of mass times pixels. With several
            channels the mass is that of all channels together, and mass does not move between channels.
        """
        scale = self.sigma / math.sqrt(2) / (math.sqrt(2) if self.ground == "euclidean" else 1.0)
        return -scale * (2 * (1 - probability)).clamp(max=1.0).log()

    def _check(self, data: Tensor, dtype: torch.dtype) -> None:
        if data.ndim != 4:
            raise ValueError(
                f"The inputs must be images (N, C, H, W), between whose pixels mass can move, got shape {tuple(data.shape)}."
            )
        rounding = 8 * torch.finfo(dtype).eps * float(data.abs().amax())
        if not bool((data >= -rounding).all()) or not bool(data.isfinite().all()):
            raise ValueError(
                f"Pixels are masses and must be finite and not negative, but in data units they range from {float(data.min()):.4g} to "
                f"{float(data.max()):.4g}. If the pipeline normalises its inputs, set threat=ThreatModel(mean=..., std=...)."
            )
        if bool((data.flatten(1).sum(1) <= 0).any()):
            raise ValueError("An image has no mass (all of its pixels are 0), so it cannot be smoothed: leave it out.")

    def _perturb(self, data: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, height, width = data.shape
        horizontal = laplace_noise((n, channels, height, width - 1), data, generator)
        vertical = laplace_noise((n, channels, height - 1, width), data, generator)
        scale = self.sigma / math.sqrt(2) * data.sum((1, 2, 3), keepdim=True)
        return apply_flow(data, scale * horizontal, scale * vertical)

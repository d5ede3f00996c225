"""Wasserstein smoothing: a randomised classifier with a certificate of robustness in the 1-Wasserstein distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.defenses.smoothing.binomial import lower_bound, two_sided_p_value
from lightning_wdefense.defenses.smoothing.flows import apply_flow, laplace_noise
from lightning_wdefense.metrics import AccuracyCurve, area_under_accuracy_curve
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.modules.state.isolation import isolated

Ground = Literal["euclidean", "manhattan"]

ABSTAIN = -1
"""The class index that means "abstain"."""


class Certificate(NamedTuple):
    """The result of :meth:`WassersteinSmoothing.certify`.

    Attributes:
        classes: certified class of each image, ``(N,)``; -1 where the classifier abstains.
        radii: certified radius of each image, ``(N,)``, in shares of mass times pixels. Within this 1-Wasserstein distance the
            smoothed classifier predicts the class; 0 where the classifier abstains.

    Example:
        >>> certificate = Certificate(torch.tensor([3, -1]), torch.tensor([0.2, 0.0]))
        >>> certificate.classes != ABSTAIN
        tensor([ True, False])
    """

    classes: Tensor
    radii: Tensor


@dataclass(frozen=True)
class WassersteinSmoothing:
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
        ground: ground distance of the radii, ``"euclidean"`` or ``"manhattan"``. The Euclidean distance is at least ``1 / sqrt(2)``
            of the Manhattan distance, so the radius is divided by ``sqrt(2)``.
        samples: number of noisy copies of each image that estimate the probabilities.
        selection: number of additional noisy copies from which :meth:`certify` chooses the class.
        alpha: error probability of each certificate and prediction.
        batch_size: number of images in one forward pass.
        seed: seed of the noise for calls without a generator.

    Raises:
        ValueError: if a setting is out of its range.

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

    sigma: float = 0.01
    threat: ThreatModel | None = None
    ground: Ground = "euclidean"
    samples: int = 10_000
    selection: int = 1_000
    alpha: float = 0.05
    batch_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite (shares of an image's mass), got {self.sigma}.")
        if self.ground not in get_args(Ground):
            raise ValueError(unknown_name("ground distance", self.ground, get_args(Ground)))
        for name in ("samples", "selection", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, such as 0.05, got {self.alpha}.")

    def noisy(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One noisy copy of each image, for training. Pixels may leave the bounds.

        Args:
            inputs: images ``(N, C, H, W)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Returns:
            Images ``(N, C, H, W)`` in model units.

        Raises:
            TypeError: if the inputs are not a float tensor.
            ValueError: if they are not images, have negative or non-finite pixels (in data units), or an image has no mass.
        """
        data = self._read(inputs)
        return self._to_model(self._move(data, self._generator(data, generator)), inputs.dtype)

    def predict(
        self, model: Callable[[Tensor], Any], inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Classes ``(N,)`` that the smoothed classifier predicts; -1 where the two most frequent classes are too close (abstain).

        Args:
            model: a module or callable from inputs to logits, whose state is preserved.
            inputs: images ``(N, C, H, W)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not a float tensor, or the outputs are not logits.
            ValueError: as :meth:`noisy`, or if the model does not give one class per image.
        """
        data = self._read(inputs)
        counts = self._count(model, data, inputs.dtype, self.samples, self._generator(data, generator))
        (first, second), classes = counts.topk(2, dim=1).values.T, counts.argmax(1)
        sure = two_sided_p_value(first, first + second) <= self.alpha
        return classes.where(sure, torch.full_like(classes, ABSTAIN)).to(inputs.device)

    def certify(
        self, model: Callable[[Tensor], Any], inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Certificate:
        """Certified classes ``(N,)`` and certified radii ``(N,)``, each with a confidence of ``1 - alpha``.

        A radius is a 1-Wasserstein distance between images of mass 1, in shares of mass times pixels. With several channels the mass
        is that of all channels together, and mass does not move between channels.

        Args:
            model: a module or callable from inputs to logits, whose state is preserved.
            inputs: images ``(N, C, H, W)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not a float tensor, or the outputs are not logits.
            ValueError: as :meth:`noisy`, or if the model does not give one class per image.
        """
        data, run = self._read(inputs), self._count
        generator = self._generator(data, generator)
        classes = run(model, data, inputs.dtype, self.selection, generator).argmax(1)
        counts = run(model, data, inputs.dtype, self.samples, generator).gather(1, classes.unsqueeze(1)).squeeze(1)
        radii = self.radius(lower_bound(counts, self.samples, self.alpha)).float()
        classes = classes.where(radii > 0, torch.full_like(classes, ABSTAIN))
        return Certificate(classes.to(inputs.device), radii.to(inputs.device))

    def radius(self, probability: Tensor) -> Tensor:
        """Certified radius for (a lower bound of) the probability of a class under noise; 0 for probabilities up to 1 / 2.

        Args:
            probability: of any shape, from 0 to 1.

        Returns:
            Radii of the same shape, in shares of mass times pixels.
        """
        scale = self.sigma / math.sqrt(2) / (math.sqrt(2) if self.ground == "euclidean" else 1.0)
        return -scale * (2 * (1 - probability)).clamp(max=1.0).log()

    def _read(self, inputs: Tensor) -> Tensor:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"The inputs must be a float tensor of images (N, C, H, W), got {kind}.")
        if inputs.ndim != 4 or 0 in inputs.shape:
            raise ValueError(
                f"The inputs must be images (N, C, H, W), between whose pixels mass can move, got shape {tuple(inputs.shape)}."
            )
        with torch.inference_mode(False), torch.no_grad():
            data = float32_or_better(inputs.detach().clone())
            data = data if self.threat is None else self.threat.to_data(data)
        rounding = 8 * torch.finfo(inputs.dtype).eps * float(data.abs().amax())
        if not bool((data >= -rounding).all()) or not bool(data.isfinite().all()):
            raise ValueError(
                f"Pixels are masses and must be finite and not negative, but in data units they range from {float(data.min()):.4g} to "
                f"{float(data.max()):.4g}. If the pipeline normalises its inputs, set threat=ThreatModel(mean=..., std=...)."
            )
        if bool((data.flatten(1).sum(1) <= 0).any()):
            raise ValueError("An image has no mass (all of its pixels are 0), so it cannot be smoothed: leave it out.")
        return data

    def _generator(self, data: Tensor, generator: torch.Generator | None) -> torch.Generator:
        return torch.Generator(data.device).manual_seed(self.seed) if generator is None else generator

    def _move(self, data: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, height, width = data.shape
        horizontal = laplace_noise((n, channels, height, width - 1), data, generator)
        vertical = laplace_noise((n, channels, height - 1, width), data, generator)
        scale = self.sigma / math.sqrt(2) * data.sum((1, 2, 3), keepdim=True)
        return apply_flow(data, scale * horizontal, scale * vertical)

    def _to_model(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        return (data if self.threat is None else self.threat.to_model(data)).to(dtype)

    def _count(
        self, model: Callable[[Tensor], Any], data: Tensor, dtype: torch.dtype, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Number of noisy copies that are classified as each class, ``(N, K)``, on the CPU."""
        found: list[Tensor] = []
        with isolated(model, data.device), torch.no_grad():
            for image in data.split(1):
                classes = []
                for part in torch.arange(samples).split(self.batch_size):
                    logits = logits_of(
                        model(self._to_model(self._move(image.expand(len(part), -1, -1, -1), generator), dtype))
                    )
                    if logits.ndim != 2:
                        raise ValueError(
                            f"Smoothing needs one class per image, logits (N, K), but the logits have shape {tuple(logits.shape)}."
                        )
                    classes.append(logits.argmax(1))
                found.append(torch.cat(classes).bincount(minlength=logits.shape[1]).cpu())
        return torch.stack(found)


def certified_accuracy_curve(certificate: Certificate, labels: Tensor, epsilons: Sequence[float]) -> AccuracyCurve:
    """Certified accuracy at each eps, and the area under the curve.

    The certified accuracy at eps is the share of images whose certified class is correct and whose certified radius is above eps.

    Args:
        certificate: result of :meth:`WassersteinSmoothing.certify`.
        labels: integer classes ``(N,)``.
        epsilons: values of eps ``(E,)``, strictly increasing from 0, in the units of the certificate's radii.

    Returns:
        The curve. Accuracies are shares in [0, 1] and never increase with eps.

    Raises:
        ValueError: if there is not one integer label per image, or ``epsilons`` does not start at 0 and increase strictly.

    Example:
        >>> import torch
        >>> certificate = Certificate(torch.tensor([0, 1, -1]), torch.tensor([0.3, 0.1, 0.0]))
        >>> certified_accuracy_curve(certificate, torch.tensor([0, 1, 1]), [0.0, 0.2]).accuracies
        tensor([0.6667, 0.3333])
    """
    if labels.shape != certificate.classes.shape or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(certificate.classes)} integers, one per image, got {labels.dtype} {tuple(labels.shape)}."
        )
    right = certificate.classes == labels
    accuracies = torch.stack([(right & (certificate.radii > eps)).float().mean() for eps in epsilons])
    area = area_under_accuracy_curve(epsilons, accuracies)
    return AccuracyCurve(accuracies.new_tensor(list(epsilons)), accuracies, area)

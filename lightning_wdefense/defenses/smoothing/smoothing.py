"""A classifier smoothed over random transport of pixel mass, which is certifiably robust to transport."""

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
"""The class that stands for no answer."""


class Certificate(NamedTuple):
    """What :meth:`WassersteinSmoothing.certify` found.

    Attributes:
        classes: of each image, ``(N,)``; -1 where nothing can be said.
        radii: within which the smoothed classifier's answer is that class, ``(N,)``; 0 where nothing can be said.
    """

    classes: Tensor
    radii: Tensor


@dataclass(frozen=True)
class WassersteinSmoothing:
    r"""Randomised smoothing in the space of flows: what the classifier says of most images with randomly moved mass.

    Between neighbouring pixels of an image of mass 1 flows move Laplace noise, horizontally and vertically. Any image that transport
    makes of it is its own image under a shift of the flows, whose L1 length is the 1-Wasserstein distance with Manhattan ground
    distance. A shift by ``r`` changes the log probability of any event by at most ``r / b``, where ``b = sigma / sqrt(2)``: if all but a
    share ``q < 1 / 2`` of the noisy images are of one class, then within ``r < b log(1 / 2q)`` it stays the most likely one. That is
    tighter than the paper's ``b / 2 log((1 - q) / q)`` at the same probabilities. The certificate is of the *smoothed* classifier,
    :meth:`predict`, which abstains or errs with a probability of at most ``alpha`` each; the classifier itself should have been
    trained on noisy images, :meth:`noisy`.

    Args:
        sigma: standard deviation of the flows, in shares of an image's mass; the paper takes 0.005 to 0.5.
        threat: the units of the inputs; its norm, eps and bounds are not used. ``None`` for inputs in data units.
        ground: ground distance of the radii: ``"euclidean"``, which is at least ``1 / sqrt(2)`` of the Manhattan one, so that the
            radius is divided by ``sqrt(2)``, or ``"manhattan"``.
        samples: noisy copies of each image from which probabilities are estimated.
        selection: further ones, from which :meth:`certify` chooses the class.
        alpha: probability with which each answer may be wrong.
        batch_size: images that the model is given at once.
        seed: seeds the noise of calls that are given no generator.

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
        """One noisy copy of each image, to train on; pixels may leave the bounds.

        Args:
            inputs: images ``(N, C, H, W)`` in model units.
            generator: source of the noise.

        Raises:
            TypeError: if the inputs are not float tensors.
            ValueError: if they are not images, hold negative or non-finite pixels (in data units), or an image has no mass.
        """
        data = self._read(inputs)
        return self._to_model(self._move(data, self._generator(data, generator)), inputs.dtype)

    def predict(
        self, model: Callable[[Tensor], Any], inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Classes ``(N,)`` of the smoothed classifier, -1 where two are too close to be told apart.

        Args:
            model: a module or callable from inputs to logits, left as it was.
            inputs: images ``(N, C, H, W)`` in model units.
            generator: source of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not float tensors, or the outputs are not logits.
            ValueError: as :meth:`noisy` does.
        """
        data = self._read(inputs)
        counts = self._count(model, data, inputs.dtype, self.samples, self._generator(data, generator))
        (first, second), classes = counts.topk(2, dim=1).values.T, counts.argmax(1)
        sure = two_sided_p_value(first, first + second) <= self.alpha
        return classes.where(sure, torch.full_like(classes, ABSTAIN)).to(inputs.device)

    def certify(
        self, model: Callable[[Tensor], Any], inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Certificate:
        """Classes ``(N,)`` and the radii ``(N,)`` within which they are certain, each with a confidence of ``1 - alpha``.

        A radius is a 1-Wasserstein distance between images of mass 1 (with several channels, of one mass over all of them, each
        channel's own staying the same), in mass times pixels.

        Args:
            model: a module or callable from inputs to logits, left as it was.
            inputs: images ``(N, C, H, W)`` in model units.
            generator: source of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not float tensors, or the outputs are not logits.
            ValueError: as :meth:`noisy` does.
        """
        data, run = self._read(inputs), self._count
        generator = self._generator(data, generator)
        classes = run(model, data, inputs.dtype, self.selection, generator).argmax(1)
        counts = run(model, data, inputs.dtype, self.samples, generator).gather(1, classes.unsqueeze(1)).squeeze(1)
        radii = self.radius(lower_bound(counts, self.samples, self.alpha)).float()
        classes = classes.where(radii > 0, torch.full_like(classes, ABSTAIN))
        return Certificate(classes.to(inputs.device), radii.to(inputs.device))

    def radius(self, probability: Tensor) -> Tensor:
        """The radius that follows from (a lower bound of) the probability of a class under noise; 0 up to one half."""
        scale = self.sigma / math.sqrt(2) / (math.sqrt(2) if self.ground == "euclidean" else 1.0)
        return -scale * (2 * (1 - probability)).clamp(max=1.0).log()

    def _read(self, inputs: Tensor) -> Tensor:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"The inputs must be a float tensor of images (N, C, H, W), got {kind}.")
        if inputs.ndim != 4 or 0 in inputs.shape:
            raise ValueError(f"Mass moves between pixels of images (N, C, H, W), got shape {tuple(inputs.shape)}.")
        with torch.inference_mode(False), torch.no_grad():
            data = float32_or_better(inputs.detach().clone())
            data = data if self.threat is None else self.threat.to_data(data)
        rounding = 8 * torch.finfo(inputs.dtype).eps * float(data.abs().amax())
        if not bool((data >= -rounding).all()) or not bool(data.isfinite().all()):
            raise ValueError(
                f"Pixels are masses, which must be finite and not negative, but in data units they run from {float(data.min()):.4g} to "
                f"{float(data.max()):.4g}. If the pipeline normalises its inputs, give threat=ThreatModel(mean=..., std=...)."
            )
        if bool((data.flatten(1).sum(1) <= 0).any()):
            raise ValueError(
                "An image has no mass (all of its pixels are 0), so there is nothing to move: leave it out."
            )
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
        """How many of the noisy copies are of each class, ``(N, K)``, on the CPU."""
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
                            f"Smoothing counts one class an image, but the logits have shape {tuple(logits.shape)}."
                        )
                    classes.append(logits.argmax(1))
                found.append(torch.cat(classes).bincount(minlength=logits.shape[1]).cpu())
        return torch.stack(found)


def certified_accuracy_curve(certificate: Certificate, labels: Tensor, epsilons: Sequence[float]) -> AccuracyCurve:
    """The share of images of which a right class is certain within each eps, and the area under that curve.

    Args:
        certificate: of :meth:`WassersteinSmoothing.certify`.
        labels: integers ``(N,)``.
        epsilons: radii ``(E,)``, strictly increasing from 0, in the units of the certificate's radii.

    Returns:
        The curve, with accuracies as shares in [0, 1] that never rise.

    Raises:
        ValueError: if the labels are not one an image, or ``epsilons`` does not start at 0 and increase strictly.

    Example:
        >>> import torch
        >>> certificate = Certificate(torch.tensor([0, 1, -1]), torch.tensor([0.3, 0.1, 0.0]))
        >>> certified_accuracy_curve(certificate, torch.tensor([0, 1, 1]), [0.0, 0.2]).accuracies
        tensor([0.6667, 0.3333])
    """
    if labels.shape != certificate.classes.shape or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(certificate.classes)} integers, one an image, got {labels.dtype} {tuple(labels.shape)}."
        )
    right = certificate.classes == labels
    accuracies = torch.stack([(right & (certificate.radii > eps)).float().mean() for eps in epsilons])
    area = area_under_accuracy_curve(epsilons, accuracies)
    return AccuracyCurve(accuracies.new_tensor(list(epsilons)), accuracies, area)

"""Randomised smoothing: what all smoothed classifiers share, whatever their noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.defenses.smoothing.binomial import lower_bound, two_sided_p_value
from lightning_wdefense.defenses.smoothing.certificate import ABSTAIN, Certificate
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.modules.state.isolation import isolated


@dataclass(frozen=True)
class RandomizedSmoothing(ABC):
    """A randomised classifier: the class that is most frequent over noisy copies of the input. Subclasses say what the noise is.

    Args:
        sigma: standard deviation of the noise.
        threat: gives the mean and std that convert model units to data units; its norm, eps and bounds are not used. ``None`` for
            inputs in data units.
        samples: number of noisy copies of each sample that estimate the probabilities.
        selection: number of additional noisy copies from which :meth:`certify` chooses the class.
        alpha: error probability of each certificate and prediction.
        batch_size: number of samples in one forward pass.
        seed: seed of the noise for calls without a generator.

    Raises:
        ValueError: if a setting is out of its range.

    References:
        Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019 (the procedure).
    """

    unit: ClassVar[str]
    """Of ``sigma``, for messages."""

    sigma: float
    threat: ThreatModel | None = None
    samples: int = 10_000
    selection: int = 1_000
    alpha: float = 0.05
    batch_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite ({self.unit}), got {self.sigma}.")
        check_counts(self, "samples", "selection", "batch_size")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, such as 0.05, got {self.alpha}.")

    @abstractmethod
    def radius(self, probability: Tensor) -> Tensor:
        """Certified radius for (a lower bound of) the probability of a class under noise; 0 for probabilities up to 1 / 2.

        Args:
            probability: of any shape, from 0 to 1.

        Returns:
            Radii of the same shape.
        """

    @abstractmethod
    def _check(self, data: Tensor, dtype: torch.dtype) -> None:
        """Refuse inputs (data units; ``dtype`` is what they were given in) that this noise does not suit."""

    @abstractmethod
    def _perturb(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """One noisy copy of each sample, in data units."""

    def noisy(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One noisy copy of each sample, for training. Values may leave the bounds.

        Args:
            inputs: inputs ``(N, ...)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Returns:
            Inputs ``(N, ...)`` in model units.

        Raises:
            TypeError: if the inputs are not a float tensor.
            ValueError: if their shape or values do not suit the noise.
        """
        data = self._read(inputs)
        return self._to_model(self._perturb(data, self._generator(data, generator)), inputs.dtype)

    def predict(
        self, model: Callable[[Tensor], Any], inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Classes ``(N,)`` that the smoothed classifier predicts; -1 where the two most frequent classes are too close (abstain).

        Args:
            model: a module or callable from inputs to logits, whose state is preserved.
            inputs: inputs ``(N, ...)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not a float tensor, or the outputs are not logits.
            ValueError: as :meth:`noisy`, or if the model does not give one class per sample.
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

        Args:
            model: a module or callable from inputs to logits, whose state is preserved.
            inputs: inputs ``(N, ...)`` in model units.
            generator: random generator of the noise; ``None`` for one seeded with ``seed``.

        Raises:
            TypeError: if the inputs are not a float tensor, or the outputs are not logits.
            ValueError: as :meth:`noisy`, or if the model does not give one class per sample.
        """
        data, run = self._read(inputs), self._count
        generator = self._generator(data, generator)
        classes = run(model, data, inputs.dtype, self.selection, generator).argmax(1)
        counts = run(model, data, inputs.dtype, self.samples, generator).gather(1, classes.unsqueeze(1)).squeeze(1)
        radii = self.radius(lower_bound(counts, self.samples, self.alpha)).float()
        classes = classes.where(radii > 0, torch.full_like(classes, ABSTAIN))
        return Certificate(classes.to(inputs.device), radii.to(inputs.device))

    def _read(self, inputs: Tensor) -> Tensor:
        """The inputs in data units."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"The inputs must be a float tensor (N, ...), got {kind}.")
        if inputs.ndim < 2 or 0 in inputs.shape:
            raise ValueError(
                f"The inputs must be (N, ...), one or more samples with at least one value, got shape {tuple(inputs.shape)}."
            )
        with torch.inference_mode(False), torch.no_grad():
            data = float32_or_better(inputs.detach().clone())
            data = data if self.threat is None else self.threat.to_data(data)
        self._check(data, inputs.dtype)
        return data

    def _generator(self, data: Tensor, generator: torch.Generator | None) -> torch.Generator:
        return torch.Generator(data.device).manual_seed(self.seed) if generator is None else generator

    def _to_model(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        return (data if self.threat is None else self.threat.to_model(data)).to(dtype)

    def _count(
        self, model: Callable[[Tensor], Any], data: Tensor, dtype: torch.dtype, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Number of noisy copies that are classified as each class, ``(N, K)``, on the CPU."""
        found: list[Tensor] = []
        with isolated(model, data.device), torch.no_grad():
            for sample in data.split(1):
                classes = []
                for part in torch.arange(samples).split(self.batch_size):
                    copies = sample.expand(len(part), *sample.shape[1:])
                    logits = logits_of(model(self._to_model(self._perturb(copies, generator), dtype)))
                    if logits.ndim != 2:
                        raise ValueError(
                            f"Smoothing needs one class per sample, logits (N, K), but the logits have shape {tuple(logits.shape)}."
                        )
                    classes.append(logits.argmax(1))
                found.append(torch.cat(classes).bincount(minlength=logits.shape[1]).cpu())
        return torch.stack(found)

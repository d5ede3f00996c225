"""Feature squeezing: compares a classifier's predictions before and after its inputs are simplified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.detection.base import Detector, Reads, read
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.modules.state.isolation import isolated


def reduce_bit_depth(data: Tensor, bits: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Round to ``2^bits`` evenly spaced values between the bounds. The gradient is that of the identity (BPDA).

    Args:
        data: values of any shape, in data units.
        bits: number of bits per value.
        bounds: smallest and largest value, in data units.

    Example:
        >>> import torch
        >>> reduce_bit_depth(torch.tensor([0.1, 0.4, 0.9]), bits=1)
        tensor([0., 0., 1.])
    """
    low, high = bounds
    step = (high - low) / (2**bits - 1)
    rounded = ((data - low) / step).round() * step + low
    # Straight-through gradient, so that an adaptive attack can minimise the score.
    return data + (rounded - data).detach() if data.requires_grad else rounded


def median_filter(images: Tensor, size: int) -> Tensor:
    """Median of the square window around each pixel. The border is padded with the nearest pixels.

    Args:
        images: ``(N, C, H, W)``.
        size: side of the window in pixels, odd.

    Example:
        >>> import torch
        >>> speck = torch.zeros(1, 1, 5, 5)
        >>> speck[..., 2, 2] = 1
        >>> median_filter(speck, 3).max()
        tensor(0.)
    """
    padded = F.pad(images, (size // 2,) * 4, mode="replicate")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(-1).values


class FeatureSqueezing(Detector):
    """Largest L1 distance between the class probabilities of an input and of its squeezed copies.

    The first copy has fewer bits per value. For images ``(N, C, H, W)`` there is a second copy, after a median filter. The detector
    reads the model's *inputs*, in model units. It runs the model in eval mode and preserves its state. It needs no fit.

    Args:
        threat: gives mean, std and bounds of the inputs; its norm and eps are not used.
        model: a module or callable from inputs to logits. :class:`~lightning_wdefense.DetectionMonitor` uses its own model.
        bits: number of bits per value in the first copy. The paper uses 1 for MNIST and 4 or 5 for colour images.
        size: side of the median filter's window in pixels, odd. The paper uses 2.

    Raises:
        ValueError: if the threat model has no bounds, ``bits`` is below 1, or ``size`` is even or below 3.

    References:
        Xu, Evans, Qi, "Feature squeezing: detecting adversarial examples in deep neural networks", NDSS 2018.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> detector = FeatureSqueezing(ThreatModel(), model, bits=1)
        >>> detector.score(torch.tensor([[0.0, 1.0, 1.0, 0.0]]))  # one bit represents these values exactly
        tensor([0.])
    """

    name: ClassVar[str] = "feature-squeezing"
    reads: ClassVar[Reads] = "inputs"
    learns: ClassVar[bool] = False

    def __init__(
        self, threat: ThreatModel, model: Callable[[Tensor], Any] | None = None, bits: int = 4, size: int = 3
    ) -> None:
        if threat.bounds is None:
            raise ValueError(
                "FeatureSqueezing rounds values between bounds, but the threat model has bounds=None: set its bounds."
            )
        if bits < 1:
            raise ValueError(f"bits must be at least 1, got {bits}.")
        if size < 3 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 3, got {size}.")
        self.threat, self.model, self.bits, self.size = threat, model, bits, size

    def of_model(self, model: Callable[[Tensor], Any]) -> FeatureSqueezing:
        """The detector itself if it has a model, otherwise a copy with this model."""
        return self if self.model is not None else FeatureSqueezing(self.threat, model, self.bits, self.size)

    def score(self, features: Any) -> Tensor:
        """Largest L1 distance between class probabilities, ``(N,)`` from 0 to 2.

        Args:
            features: inputs ``(N, ...)`` in model units.

        Raises:
            RuntimeError: if the detector has no model.
            TypeError: if the inputs are not a float tensor.
            ValueError: if the inputs are not finite.
        """
        if self.model is None:
            raise RuntimeError("FeatureSqueezing has no model to run: give it one with model=.")
        if not isinstance(features, Tensor):
            raise TypeError(f"FeatureSqueezing needs the model's inputs as one tensor, got {type(features).__name__}.")
        read(features)
        return self.score_layer(None, features)

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> None:
        """Do nothing; feature squeezing needs no fit."""

    def score_layer(self, fitted: None, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of inputs ``(N, ...)`` in model units."""
        threat, differentiable = self.threat, torch.is_grad_enabled() and features.requires_grad
        assert threat.bounds is not None
        assert self.model is not None
        with isolated(self.model, features.device), torch.set_grad_enabled(differentiable):
            features = features if differentiable else features.detach().clone()
            data = threat.to_data(float32_or_better(features))
            squeezed = [reduce_bit_depth(data, self.bits, threat.bounds)]
            if data.ndim == 4:
                squeezed.append(median_filter(data, self.size))
            before = self._probabilities(data, features.dtype)
            distances = [(self._probabilities(each, features.dtype) - before).abs().sum(1) for each in squeezed]
            return torch.stack(distances).amax(0)

    def _probabilities(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = self.threat.to_model(data).to(dtype, copy=True)  # a copy, because the model may work in place
        assert self.model is not None
        return float32_or_better(logits_of(self.model(inputs))).softmax(1)

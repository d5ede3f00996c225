"""The base class of all detectors, and the checks of their features and labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lightning_wdefense.modules.outputs import float32_or_better

Features = Tensor | Sequence[Tensor]
"""Features ``(N, ...)`` of one layer, or a sequence with the features of several layers."""

Reads = Literal["outputs", "features", "inputs"]
"""What a detector reads: the model's logits, features of a layer, or the model's inputs."""

DetectorT = TypeVar("DetectorT", bound="Detector")


class Detector(ABC):
    """Distinguishes adversarial from clean inputs: ``fit(features, labels)`` on clean data, then ``score(features) -> (N,)``.

    A higher score means that a sample is more likely adversarial. Only the order of scores matters. For several layers, a detector
    scores each layer separately and adds up the scores. Scores are computed in float32 or better, without autocast. Gradients reach
    the features, so an adaptive attack can minimise the score.

    Subclasses implement :meth:`fit_layer` and :meth:`score_layer`.

    Attributes:
        name: the detector's short name, as in logs and in :func:`get_detector`.
        reads: what the detector reads: the model's logits (``"outputs"``), a layer's ``"features"``, or the model's ``"inputs"``.
        learns: whether the detector must be fitted before it can score.

    Example:
        >>> import torch
        >>> class Norm(Detector):
        ...     name, learns = "norm", False
        ...     def fit_layer(self, features, labels):
        ...         return None
        ...     def score_layer(self, fitted, features):
        ...         return features.norm(dim=1)
        >>> Norm().score(torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """

    name: ClassVar[str]
    reads: ClassVar[Reads] = "features"
    learns: ClassVar[bool] = True

    _fitted: list[Any] | None = None
    _widths: list[int] | None = None

    @abstractmethod
    def fit_layer(self, features: Tensor, labels: Tensor | None) -> Any:
        """The fitted state of one layer, from its clean features ``(N, D)``, for :meth:`score_layer`."""

    @abstractmethod
    def score_layer(self, fitted: Any, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of one layer's features ``(N, D)``."""

    def fit(self: DetectorT, features: Features, labels: Tensor | None = None) -> DetectorT:
        """Fit the detector to clean samples, and replace any earlier fit.

        Args:
            features: features of clean samples, ``(N, ...)``, or a sequence of those of several layers.
            labels: classes ``(N,)`` of the samples, for detectors that use classes.

        Returns:
            The detector itself.

        Raises:
            TypeError: if features are not float tensors, or labels are not integers.
            ValueError: if there are too few samples, features are empty or not finite, or shapes do not fit together.
        """
        layers = read(features)
        if labels is not None:
            labels = _read_labels(labels, len(layers[0])).to(layers[0].device)
        # Copies, so that later changes of the caller's tensors have no effect, and so that autograd may save them.
        with torch.inference_mode(False), torch.no_grad(), _in_full_precision(layers[0]):
            labels = None if labels is None else labels.clone()
            fitted = [self.fit_layer(layer.detach().clone(), labels) for layer in layers]
        self._fitted, self._widths = fitted, [layer.shape[1] for layer in layers]
        return self

    @property
    def ready(self) -> bool:
        """Whether the detector can score: it is fitted, or needs no fit."""
        return self._fitted is not None or not self.learns

    def of_model(self: DetectorT, model: Callable[[Tensor], Any]) -> DetectorT:
        """The detector for this model: the detector itself, unless it runs a model and has none yet."""
        return self

    def score(self, features: Features) -> Tensor:
        """Score of each sample; a higher score means more likely adversarial.

        Args:
            features: ``(N, ...)`` as in :meth:`fit`, on the same device.

        Returns:
            Scores ``(N,)`` in float32 or better.

        Raises:
            RuntimeError: if the detector must be fitted and is not.
            TypeError: if features are not float tensors.
            ValueError: if features are not finite, or their width or number of layers differs from the fit.
        """
        if not self.ready:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(features, labels) on clean data first.")
        layers = read(features)
        widths = [layer.shape[1] for layer in layers]
        if self._widths is not None and widths != self._widths:
            raise ValueError(
                f"{type(self).__name__} was fitted on features of width {_one_or_all(self._widths)}, got {_one_or_all(widths)}. Take the "
                "features from the same layers, at the same input size."
            )
        fitted = [None] * len(layers) if self._fitted is None else self._fitted
        with _in_full_precision(layers[0]):
            return sum(self.score_layer(*each) for each in zip(fitted, layers, strict=True))  # type: ignore[return-value]


def check_enough_samples(needed: int, features: Tensor, reason: str) -> None:
    """Raise an error if there are too few samples.

    Args:
        needed: smallest number of samples.
        features: ``(N, D)``.
        reason: what the samples are needed for, such as ``"to estimate a density"``.

    Raises:
        ValueError: if there are fewer than ``needed``; the message gives both numbers and the reason.
    """
    if len(features) < needed:
        raise ValueError(f"At least {needed} clean samples are needed {reason}, got {len(features)}.")


def spread(features: Tensor) -> float:
    """Square root of the mean variance of the features ``(N, D)``, in units of the features.

    Raises:
        ValueError: if the value is 0.
    """
    value = float(features.cpu().double().var(0, correction=0).mean().sqrt())
    if value == 0:
        raise ValueError(
            "All clean samples have the same features, so distances have no scale: fit on other samples or features."
        )
    return value


def read(features: Features) -> list[Tensor]:
    """Features ``(N, D)`` of each layer, in float32 or better.

    Raises:
        TypeError: if features are not float tensors.
        ValueError: if features are empty or not finite, or layers have different numbers of samples.
    """
    layers = [features] if isinstance(features, Tensor) else list(features)
    if not layers:
        raise ValueError("The features are an empty list: give the features of at least one layer.")
    for layer in layers:
        if not isinstance(layer, Tensor) or not layer.is_floating_point():
            kind = layer.dtype if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(f"The features must be a float tensor (N, ...) or a list of float tensors, got {kind}.")
        if layer.ndim == 0 or 0 in layer.shape:
            raise ValueError(
                f"The features must be a batch with at least one sample and value, got shape {tuple(layer.shape)}."
            )
        if len(layer) != len(layers[0]):
            raise ValueError(
                f"All layers must have features of the same samples, got {len(layers[0])} and {len(layer)} samples."
            )
        if not bool(layer.detach().isfinite().all()):
            raise ValueError(
                "The features contain NaN or infinite values: check whether the model or the attack diverged."
            )
    return [float32_or_better(layer).reshape(len(layer), -1) for layer in layers]


def _read_labels(labels: Tensor, samples: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"The labels must be an integer tensor (N,) of classes, got {kind}. Take the argmax of soft labels."
        )
    if labels.shape != (samples,):
        raise ValueError(
            f"The labels must have one class for each of the {samples} samples, shape ({samples},), got {tuple(labels.shape)}."
        )
    return labels


def _in_full_precision(features: Tensor) -> torch.autocast:
    return torch.autocast(features.device.type, enabled=False)


def _one_or_all(widths: list[int]) -> str:
    return str(widths[0] if len(widths) == 1 else widths)

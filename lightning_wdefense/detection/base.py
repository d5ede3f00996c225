"""The contract of every detector, kept in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lightning_wdefense.modules.outputs import float32_or_better

Features = Tensor | Sequence[Tensor]
"""What one layer, or each of several layers, shows of a batch: ``(N, ...)``."""

Reads = Literal["outputs", "features", "inputs"]
DetectorT = TypeVar("DetectorT", bound="Detector")


class Detector(ABC):
    """Tells adversarial inputs from clean ones: ``fit(features, labels)`` on clean data, then ``score(features) -> (N,)``.

    The higher the score, the more adversarial the sample looks; only the order of scores means something. A detector that is
    given several layers treats each by itself and adds up their scores. Scores are computed in float32 or better with autocast
    off, and gradients reach the features, so that an attack can be told to evade the detector.

    Attributes:
        name: the detector's short name, as in logs and in :func:`get_detector`.
        reads: what it wants of a model: its logits (``"outputs"``), a layer's ``"features"``, or the model's own ``"inputs"``.
        learns: whether it must be fitted before it can score.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads] = "features"
    learns: ClassVar[bool] = True

    _fitted: list[Any] | None = None
    _widths: list[int] | None = None

    @abstractmethod
    def fit_layer(self, features: Tensor, labels: Tensor | None) -> Any:
        """What is learned of one layer's clean features ``(N, D)``, for :meth:`score_layer`."""

    @abstractmethod
    def score_layer(self, fitted: Any, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of one layer's features ``(N, D)``."""

    def fit(self: DetectorT, features: Features, labels: Tensor | None = None) -> DetectorT:
        """Learn what clean samples look like; forgets what was learned before.

        Args:
            features: of clean samples, ``(N, ...)``, or those of several layers.
            labels: their classes ``(N,)``, for detectors that look at each class.

        Returns:
            The detector itself.

        Raises:
            TypeError: if features are not float tensors, or labels not integers.
            ValueError: if they are empty or not finite, do not fit together, or are too few.
        """
        layers = read(features)
        if labels is not None:
            labels = _read_labels(labels, len(layers[0])).to(layers[0].device)
        # Copies that no later change of the caller's memory reaches, and that a graph may save.
        with torch.inference_mode(False), torch.no_grad(), _in_full_precision(layers[0]):
            labels = None if labels is None else labels.clone()
            fitted = [self.fit_layer(layer.detach().clone(), labels) for layer in layers]
        self._fitted, self._widths = fitted, [layer.shape[1] for layer in layers]
        return self

    @property
    def ready(self) -> bool:
        """Whether it can score: it was fitted, or learns nothing."""
        return self._fitted is not None or not self.learns

    def of_model(self: DetectorT, model: Callable[[Tensor], Any]) -> DetectorT:
        """The detector for the inputs of this model: itself, unless it runs a model and was given none."""
        return self

    def score(self, features: Features) -> Tensor:
        """How adversarial each sample looks.

        Args:
            features: ``(N, ...)`` as in :meth:`fit`, on the same device.

        Returns:
            Scores ``(N,)`` in float32 or better.

        Raises:
            RuntimeError: if the detector learns and has not been fitted.
            TypeError: if features are not float tensors.
            ValueError: if they are not finite, or of another width or number of layers than fitted.
        """
        if not self.ready:
            raise RuntimeError(
                f"{type(self).__name__} was asked before it was fitted: call fit(features, labels) on clean data."
            )
        layers = read(features)
        widths = [layer.shape[1] for layer in layers]
        if self._widths is not None and widths != self._widths:
            raise ValueError(
                f"{type(self).__name__} was fitted on features of width {_one_or_all(self._widths)}, got {_one_or_all(widths)}: take "
                "them from the same layers at the same input size."
            )
        fitted = [None] * len(layers) if self._fitted is None else self._fitted
        with _in_full_precision(layers[0]):
            return sum(self.score_layer(*each) for each in zip(fitted, layers, strict=True))  # type: ignore[return-value]


def check_enough_samples(needed: int, features: Tensor, reason: str) -> None:
    """Refuse too few samples.

    Raises:
        ValueError: saying how many there are and what for more are needed.
    """
    if len(features) < needed:
        raise ValueError(f"At least {needed} clean samples are needed {reason}, got {len(features)}.")


def spread(features: Tensor) -> float:
    """Root of the features' mean variance.

    Raises:
        ValueError: if it is 0.
    """
    value = float(features.cpu().double().var(0, correction=0).mean().sqrt())
    if value == 0:
        raise ValueError("All clean samples have the same features, so there is no scale to measure by.")
    return value


def read(features: Features) -> list[Tensor]:
    """Each layer's features ``(N, D)`` in float32 or better.

    Raises:
        TypeError: if they are not float tensors.
        ValueError: if they are empty or not finite, or of different samples.
    """
    layers = [features] if isinstance(features, Tensor) else list(features)
    if not layers:
        raise ValueError("The features are an empty list: give at least one layer's.")
    for layer in layers:
        if not isinstance(layer, Tensor) or not layer.is_floating_point():
            kind = layer.dtype if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(f"The features must be a float tensor (N, ...) or a list of such, got {kind}.")
        if layer.ndim == 0 or 0 in layer.shape:
            raise ValueError(
                f"The features must be a batch with at least one sample and value, got shape {tuple(layer.shape)}."
            )
        if len(layer) != len(layers[0]):
            raise ValueError(f"All layers must show the same samples, got {len(layers[0])} and {len(layer)} of them.")
        if not bool(layer.detach().isfinite().all()):
            raise ValueError(
                "The features hold NaN or infinite values: look for a model that diverged, or for an attack."
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
            f"The labels must give each of the {samples} samples a class, ({samples},), got {tuple(labels.shape)}."
        )
    return labels


def _in_full_precision(features: Tensor) -> torch.autocast:
    return torch.autocast(features.device.type, enabled=False)


def _one_or_all(widths: list[int]) -> str:
    return str(widths[0] if len(widths) == 1 else widths)

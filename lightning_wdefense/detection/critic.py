"""A detector that uses the score of a trained critic."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense._typing import TensorResult
from lightning_wdefense.detection.base import Detector


class CriticScore(Detector):
    """Negative value of a critic: a callable that is high on clean features and low on adversarial ones, as in WGAN.

    The critic must already be trained, on clean *and* adversarial features. So unlike the other detectors, this one knows the attack.
    It needs no fit.

    Args:
        critic: a callable ``(N, D) -> (N,)`` or ``(N, D) -> (N, 1)``.

    Raises:
        TypeError: if the critic is not callable.
        ValueError: in ``score``, if the critic does not return one number per sample.

    References:
        Arjovsky, Chintala, Bottou, "Wasserstein generative adversarial networks", ICML 2017.

    Example:
        >>> import torch
        >>> CriticScore(lambda features: features.mean(1)).score(torch.tensor([[1.0, 3.0]]))
        tensor([-2.])
    """

    name: ClassVar[str] = "critic"
    learns: ClassVar[bool] = False

    def __init__(self, critic: Callable[[Tensor], TensorResult]) -> None:
        if not callable(critic):
            raise TypeError(f"critic must be a callable (N, D) -> (N,), got {type(critic).__name__}.")
        self.critic = critic

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> None:
        """Do nothing; the critic is already trained."""

    def score_layer(self, fitted: None, features: Tensor) -> Tensor:
        """Scores ``(N,)`` of features ``(N, D)``."""
        values = self.critic(features)
        if not isinstance(values, Tensor) or values.numel() != len(features):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The critic must return one number per sample, shape ({len(features)},) here, got {shape}."
            )
        return -values.reshape(-1).to(torch.promote_types(values.dtype, torch.float32))

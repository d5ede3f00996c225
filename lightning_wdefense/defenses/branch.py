"""The result of one forward pass of a model: outputs, features and loss."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Branch(NamedTuple):
    """Outputs and features of a model for one set of inputs, clean or adversarial.

    Attributes:
        outputs: the model's return value.
        features: ``(N, ...)``; ``(N, 0)`` if the recipe compares no features.
        loss: the loss of the user's own step; ``None`` after a plain forward pass.
    """

    outputs: Any
    features: Tensor
    loss: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether the features are free of NaN and infinite values."""
        return bool(self.features.isfinite().all())

"""What a model made of one set of inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Branch(NamedTuple):
    """The model's view of one set of inputs: raw outputs, features ``(N, ...)``, and the loss of the user's own step.

    Features are ``(N, 0)`` where there are none, and the recipe compares none. There is no loss where it was a plain forward pass.
    """

    outputs: Any
    features: Tensor
    loss: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether the features are numbers."""
        return bool(self.features.isfinite().all())

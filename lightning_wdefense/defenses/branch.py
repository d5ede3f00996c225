"""What a model made of one set of inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Branch(NamedTuple):
    """The model's view of one set of inputs: raw outputs, and features ``(N, ...)``.

    Features are ``(N, 0)`` where the outputs hold no tensor, and the recipe compares none.
    """

    outputs: Any
    features: Tensor

    @property
    def finite(self) -> bool:
        """Whether the features are numbers."""
        return bool(self.features.isfinite().all())

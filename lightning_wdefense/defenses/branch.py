"""What a model made of one set of inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Branch(NamedTuple):
    """The model's view of one set of inputs: raw outputs, and features ``(N, ...)``."""

    outputs: Any
    features: Tensor

"""The settings of the sliced Wasserstein distance, with their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.transport.sliced.directions import check_directions

Directions = Literal["orthogonal", "random", "max"]


@dataclass(frozen=True, eq=False)
class SlicedOptions:
    """The keyword arguments of :func:`~lightning_wdefense.transport.sliced_wasserstein`, which documents them."""

    p: float = 2
    n_projections: int = 64
    directions: Directions | Tensor = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.p, Real) or isinstance(self.p, bool):
            raise TypeError(f"p must be a number, got {type(self.p).__name__}.")
        if not 1 <= self.p < math.inf:
            raise ValueError(f"p must be at least 1 and finite, got {self.p}.")
        if not isinstance(self.n_projections, int) or isinstance(self.n_projections, bool) or self.n_projections < 1:
            raise ValueError(f"n_projections must be a positive integer, got {self.n_projections!r}.")
        if isinstance(self.directions, Tensor):
            check_directions(self.directions)
        elif not isinstance(self.directions, str):
            names = ", ".join(map(repr, get_args(Directions)))
            raise TypeError(
                f"directions must be one of {names} or a tensor (K, D), got {type(self.directions).__name__}."
            )
        elif self.directions not in get_args(Directions):
            raise ValueError(unknown_name("choice of directions", self.directions, get_args(Directions)))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be an integer, got {type(self.seed).__name__}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}.")

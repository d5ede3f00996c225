"""The settings that the Sinkhorn functions share, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense._typing import TensorResult

Cost = Callable[[Tensor, Tensor], TensorResult]
NamedCost = Literal["cosine"]
Solver = Literal["native", "geomloss"]


@dataclass(frozen=True)
class SinkhornOptions:
    """Keywords of :func:`~lightning_wdefense.transport.entropic`, which documents them."""

    p: int = 2
    blur: float | None = None
    relative_blur: float = 0.2
    reach: float | None = None
    cost: NamedCost | Cost | None = None
    label_cost: float | None = None
    tol: float = 5e-4
    max_iter: int = 1000
    solver: Solver = "native"

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p must be 1 (cost |x - y|) or 2 (cost |x - y|^2 / 2), got {self.p!r}.")
        if self.blur is not None:
            _check_number("blur", self.blur, "None for a blur relative to the data")
        _check_number("relative_blur", self.relative_blur, "the default is 0.2")
        _check_number("tol", self.tol, "the default is 5e-4")
        if self.reach is not None:
            _check_number("reach", self.reach, "None for balanced transport")
        if self.label_cost is not None:
            _check_number("label_cost", self.label_cost, "None for a cost blind to labels", positive=False)
        if isinstance(self.cost, str):
            if self.cost not in get_args(NamedCost):
                raise ValueError(unknown_name("cost", self.cost, get_args(NamedCost)))
            if self.p != 2:
                raise ValueError(
                    f'cost="cosine" is half the squared distance of directions, so p must be 2, got {self.p}.'
                )
        elif self.cost is not None and not callable(self.cost):
            raise TypeError(
                f'cost must be a callable (x, y) -> cost matrix, "cosine" or None, got {type(self.cost).__name__}.'
            )
        if not isinstance(self.max_iter, int) or self.max_iter < 1:
            raise ValueError(f"max_iter must be a positive integer, got {self.max_iter!r}.")
        if self.solver not in get_args(Solver):
            raise ValueError(unknown_name("solver", self.solver, get_args(Solver)))

    @property
    def rho(self) -> float | None:
        """Price of creating or destroying mass, in units of the cost; ``None`` for balanced transport."""
        return None if self.reach is None else float(self.reach) ** self.p


def _check_number(name: str, value: object, otherwise: str, positive: bool = True) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number ({otherwise}), got {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be {wanted} and finite ({otherwise}), got {value}.")

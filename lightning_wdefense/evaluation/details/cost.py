"""How long an evaluation takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Seconds(Metric):
    """Seconds of the attacks, and of all of the evaluation; with several processes, those of the slowest.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> seconds = Seconds()
        >>> seconds.update(attacks=1.5, total=2.0)
        >>> seconds.compute()
        {'attacks': 1.5, 'total': 2.0}
    """

    full_state_update = False

    attacks: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("attacks", "total"):
            self.add_state(state, torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, *, attacks: float = 0.0, total: float = 0.0) -> None:
        """Add seconds."""
        self.attacks, self.total = self.attacks + attacks, self.total + total

    def compute(self) -> dict[str, float]:
        """The seconds by name."""
        return {"attacks": float(self.attacks), "total": float(self.total)}

"""The metrics that the monitor keeps of one dataloader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics import MeanMetric, SumMetric

from lightning_wdefense.attacks.labels import IGNORED
from lightning_wdefense.metrics import (
    AccuracyCurve,
    AttackSuccessRate,
    RobustAccuracy,
    RobustAccuracyCurve,
    TransportShift,
)


@dataclass
class Measures:
    """The metrics of one dataloader, each reduced over the ranks when it is computed."""

    accuracy: RobustAccuracy
    success: AttackSuccessRate
    curve: RobustAccuracyCurve | None
    shift: TransportShift | None
    losses: dict[str, MeanMetric]
    classified: SumMetric

    @classmethod
    def of(cls, attacks: Sequence[str], epsilons: Sequence[float] | None, *, shift: bool) -> Measures:
        """Fresh metrics for these attacks and radii."""
        names = ("clean_loss", "robust_loss", *(f"robust_loss_{attack}" for attack in attacks))
        losses, classified = {name: MeanMetric(nan_strategy="disable") for name in names}, SumMetric()
        for (
            mean
        ) in losses.values():  # nothing yet: a rank that sees no batch takes part in the reduction without a warning
            mean.update(0.0, 0.0)
        classified.update(0.0)
        return cls(
            RobustAccuracy(attacks, ignore_index=IGNORED),
            AttackSuccessRate(ignore_index=IGNORED),
            None if epsilons is None else RobustAccuracyCurve(epsilons, ignore_index=IGNORED),
            TransportShift() if shift else None,
            losses,
            classified,
        )

    def to(self, device: torch.device) -> Measures:
        """The same on another device."""
        for metric in (self.accuracy, self.success, self.curve, self.shift, *self.losses.values(), self.classified):
            if metric is not None:
                metric.to(device)
        return self

    def compute(self) -> tuple[dict[str, float], AccuracyCurve | None]:
        """Values by the names they are logged under, and the accuracy curve.

        Everything is computed on every rank, for some may have seen no batch: accuracies are reported where labels are classes, losses where
        the step's loss is all that there is.
        """
        accuracy = self.accuracy.compute()
        values = {"clean_acc": accuracy.pop("clean"), "robust_acc": accuracy.pop("robust")}
        values |= {f"robust_acc_{attack}": value for attack, value in accuracy.items()}
        values["attack_success"] = self.success.compute()
        curve = None if self.curve is None else self.curve.compute()
        if curve is not None:
            values["auac"] = curve.auac
        weights = sum(float(metric.weight) for metric in self.losses.values())
        losses = {name: metric.compute() for name, metric in self.losses.items()}
        if weights and not float(self.classified.compute()):
            values, curve = losses, None
        if self.shift is not None:
            values["transport_shift"] = self.shift.compute()
        return {key: float(value) for key, value in values.items()}, curve

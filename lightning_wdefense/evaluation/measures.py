"""The metrics that an evaluation keeps for one dataloader."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric

from lightning_wdefense.attacks.labels import IGNORED
from lightning_wdefense.evaluation.details.classes import ClassCounts
from lightning_wdefense.evaluation.details.cost import Seconds
from lightning_wdefense.evaluation.details.examples import ExampleRanking, Examples
from lightning_wdefense.evaluation.details.plan import ClassPlan
from lightning_wdefense.evaluation.distances import SampleDistances
from lightning_wdefense.metrics import (
    AccuracyCurve,
    AttackSuccessRate,
    RobustAccuracy,
    RobustAccuracyCurve,
    TransportShift,
)


class Details(NamedTuple):
    """What a report shows beside the values.

    Attributes:
        examples: the least and the most robust samples, or ``None``.
        plan: the transport plan by class ``(K, K)`` on the CPU, or ``None``.
        seconds: seconds of the attacks, and of all of the evaluation.
    """

    examples: Examples | None
    plan: Tensor | None
    seconds: dict[str, float]


@dataclass
class Measures:
    """The metrics of one dataloader. Each is reduced over the ranks when it is computed.

    Attributes:
        accuracy: clean and robust accuracy.
        success: success rate of the attacks.
        curve: accuracy by eps, or ``None``.
        shift: transport shift of the features, or ``None``.
        distances: distances of the samples, or ``None``.
        losses: losses of the step, summed over samples; for batches whose labels are not classes.
        classified: number of samples whose labels are classes.
        attacked: number of samples for which the step's loss was attacked.
        classes: accuracies by class.
        seconds: how long the attacks and the evaluation took.
        examples: the least and the most robust samples, or ``None``.
        plan: the transport plan by class, or ``None``.
    """

    accuracy: RobustAccuracy
    success: AttackSuccessRate
    curve: RobustAccuracyCurve | None
    shift: TransportShift | None
    distances: SampleDistances | None
    losses: dict[str, SumMetric]
    classified: SumMetric
    attacked: SumMetric
    classes: ClassCounts
    seconds: Seconds
    examples: ExampleRanking | None
    plan: ClassPlan | None

    @classmethod
    def of(
        cls,
        attacks: Sequence[str],
        epsilons: Sequence[float] | None,
        *,
        shift: bool,
        distances: bool = False,
        examples: int = 0,
    ) -> Measures:
        """New, empty metrics for these attacks and values of eps. With distances, the accuracy curve follows from them."""
        names = ("clean_loss", "robust_loss", *(f"robust_loss_{attack}" for attack in attacks))
        # A loss that is NaN shows in the sum. "disable" says the same, but only from torchmetrics 1.7.
        losses = {name: SumMetric(nan_strategy=math.nan) for name in names}
        classified, attacked, seconds = SumMetric(), SumMetric(), Seconds()
        seconds.update()
        for total in (*losses.values(), classified, attacked):
            total.update(0.0)  # so that a rank without batches takes part in the reduction without a warning
        return cls(
            RobustAccuracy(attacks, ignore_index=IGNORED),
            AttackSuccessRate(ignore_index=IGNORED),
            None if epsilons is None or distances else RobustAccuracyCurve(epsilons, ignore_index=IGNORED),
            TransportShift() if shift else None,
            SampleDistances() if distances else None,
            losses,
            classified,
            attacked,
            ClassCounts(),
            seconds,
            ExampleRanking(examples, by_distance=distances) if examples else None,
            ClassPlan() if shift and examples else None,
        )

    def to(self, device: torch.device) -> Measures:
        """Move all metrics to a device."""
        for metric in self.metrics().values():
            metric.to(device)
        return self

    def metrics(self) -> dict[str, Metric]:
        """All metrics by their names, without those that are ``None``."""
        found: dict[str, Metric] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found |= {f"{field.name}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {}
            found |= {field.name: value} if isinstance(value, Metric) else {}
        return found

    def add_shift(self, clean: Tensor, attacked: Tensor, labels: Tensor | None = None, classes: int = 0) -> None:
        """Add features ``(N, D)`` of clean and of attacked samples to the transport shift and, with labels, to the plan, if measured."""
        # The features of a diverged model cannot be measured, but the run should go on.
        if self.shift is None or len(clean) != len(attacked):
            return
        finite = clean.isfinite().all(1) & attacked.isfinite().all(1)
        if finite.any():
            self.shift.update(clean[finite], attacked[finite])
            if self.plan is not None and labels is not None:
                self.plan.update(clean[finite], attacked[finite], labels[finite], classes)

    def details(self, since: float) -> Details:
        """What a report shows beside the values, of all ranks.

        Args:
            since: when the computation of the values began, by ``time.perf_counter()``.
        """
        with warnings.catch_warnings():  # masks have no examples and no plan
            warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before the ``update``")
            examples = None if self.examples is None else self.examples.compute()
            plan = None if self.plan is None else self.plan.compute()
        plan = None if plan is None else plan.cpu()
        self.seconds.update(total=time.perf_counter() - since)
        return Details(examples, plan, self.seconds.compute())

    def compute(
        self, summary: Callable[[Tensor], tuple[dict[str, Tensor], AccuracyCurve]] | None = None
    ) -> tuple[dict[str, float], AccuracyCurve | None]:
        """Values by the names under which they are logged, and the accuracy curve.

        Args:
            summary: what follows from the distances of all samples; with distances only.

        If the labels are classes the values are accuracies, otherwise losses. Every rank reports the same kind, even a rank without
        batches.
        """
        attacked = self.attacked.compute()
        values: dict[str, Any] = {name: metric.compute() / attacked for name, metric in self.losses.items()}
        curve = None
        if float(self.classified.compute()) or not float(attacked):
            accuracy = self.accuracy.compute()
            values = {"clean_acc": accuracy.pop("clean"), "robust_acc": accuracy.pop("robust")}
            values |= {f"robust_acc_{attack}": value for attack, value in accuracy.items()}
            values["attack_success"] = self.success.compute()
            curve = None if self.curve is None else self.curve.compute()
            if self.distances is not None and summary is not None:
                found, curve = summary(self.distances.compute())
                values |= found
            if curve is not None:
                values["auac"] = curve.auac
        if self.shift is not None:
            values["transport_shift"] = self.shift.compute()
        return {key: float(value) for key, value in values.items()}, curve

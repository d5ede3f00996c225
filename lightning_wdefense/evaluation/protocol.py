"""What an evaluation measures and how: the attacks, the budgets of the accuracy curve, and the features."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks import Attack, MinimalAttack, ThreatModel, WorstCase, worst_case
from lightning_wdefense.attacks.registry import Attacks, evaluation_attacks
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch
from lightning_wdefense.evaluation.details.examples import margins_of
from lightning_wdefense.evaluation.distances import POINTS, DistanceProtocol, summary
from lightning_wdefense.evaluation.measures import Measures
from lightning_wdefense.evaluation.samples import samples_of
from lightning_wdefense.metrics import AccuracyCurve
from lightning_wdefense.modules.outputs import float32_or_better, logits_of
from lightning_wdefense.modules.recording import OUTPUTS, PENULTIMATE

Noise = Callable[[], torch.Generator]
"""Creates the random generator of a batch, with the same state at every call."""


class Measurement(NamedTuple):
    """What was measured of a batch.

    Attributes:
        worst_case: the worst case of each sample at the threat model's eps.
        distances: distances of the samples ``(N,)`` in data units, if they are measured.
    """

    worst_case: WorstCase
    distances: Tensor | None


@dataclass(frozen=True)
class EvaluationProtocol:
    """What is measured of a classifier, and how.

    Args:
        threat: the threat model.
        attacks: the attacks, by name, in the order in which they run.
        epsilons: values of eps for the accuracy curve, increasing from 0; ``None`` for no curve.
        independent: run each attack on every sample that is classified correctly on clean inputs.
        ignore_index: label of elements that are left out, besides -100.
        features: where the transport shift is measured; ``None`` for no transport shift.
        distances: how the distances of the samples are measured, from which the curve then follows; ``None`` for no distances.
        examples: number of the least and of the most robust samples to keep; with them, the transport plan by class is measured.

    Raises:
        TypeError: if the name of an attack is not a string.
        ValueError: if an attack has the name of another value, or the values of eps are not two or more that increase from 0.
    """

    threat: ThreatModel
    attacks: Mapping[str, Attack]
    epsilons: tuple[float, ...] | None = None
    independent: bool = False
    ignore_index: int | None = None
    features: str | None = PENULTIMATE
    distances: DistanceProtocol | None = None
    examples: int = 0

    def __post_init__(self) -> None:
        self.new_measures(torch.device("cpu"))  # checks the names and the values of eps now, not after the first batch

    @classmethod
    def of(
        cls,
        threat: ThreatModel,
        attacks: Attacks,
        *,
        epsilons: Sequence[float] | None,
        independent: bool,
        ignore_index: int | None,
        features: str | None,
        distances: str | MinimalAttack | None,
        p: float,
        examples: int = 0,
    ) -> EvaluationProtocol:
        """The protocol that a user's arguments describe: attacks by name, and values of eps in any order, without 0.

        With distances, the default values of eps are 21 from 0 to the threat model's eps.

        Raises:
            TypeError: if something is neither a name nor an attack, or ``threat`` is not a threat model.
            ValueError: if an attack is unknown, is unbounded, or was made for another threat model, if two have the same name, or
                if no value of eps is positive.
        """
        found = evaluation_attacks(attacks, threat)
        budgets = None if epsilons is None else (0.0, *sorted({float(eps) for eps in epsilons} - {0.0}))
        search = None if distances is None else DistanceProtocol.of(distances, threat, p)
        if search is not None and budgets is None:
            budgets = tuple(threat.eps * index / (POINTS - 1) for index in range(POINTS))
        return cls(threat, found, budgets, independent, ignore_index, features, search, examples)

    @property
    def attacks_a_batch(self) -> int:
        """Number of attacks on each batch, for a progress bar."""
        if self.distances is not None:
            return len(self.attacks) + 1
        return len(self.attacks) * (1 + len(set(self.epsilons or ()) - {0.0, self.threat.eps}))

    def new_measures(self, device: torch.device) -> Measures:
        """New, empty metrics for one dataloader."""
        kinds = {"shift": self.features is not None, "distances": self.distances is not None}
        return Measures.of(tuple(self.attacks), self.epsilons, **kinds, examples=self.examples).to(device)

    def compute(self, measures: Measures) -> tuple[dict[str, float], AccuracyCurve | None]:
        """Values of the metrics by the names under which they are logged, and the accuracy curve."""
        if self.distances is None or self.epsilons is None:
            return measures.compute()
        return measures.compute(partial(summary, threat=self.threat, p=self.distances.p, epsilons=self.epsilons))

    def measure(
        self, measures: Measures, batch: AttackedBatch, noise: Noise, on_attack: Callable[[str, Tensor], None]
    ) -> Measurement:
        """Attack a batch whose labels are classes, and update the metrics.

        Args:
            measures: the metrics, from :meth:`new_measures`.
            batch: the batch, inside of its :meth:`~lightning_wdefense.evaluation.attacked_batch.AttackedBatch.ready`.
            noise: creates the batch's random generator.
            on_attack: called after each attack with its name and the mask ``(N,)`` of the samples that remain.

        Returns:
            The worst case of each sample at the threat model's eps, and the distances.
        """

        def run(attacks: Mapping[str, Attack], **options: Any) -> WorstCase:
            options |= {"ignore_index": self.ignore_index, "generator": noise, "on_attack": on_attack}
            fitted = {name: batch.fitted(attack) for name, attack in attacks.items()}
            return worst_case(batch.model, fitted, batch.inputs, batch.labels, **options)

        start = time.perf_counter()
        # The user's own metrics may be other than accuracy, so samples that are wrong on clean inputs are attacked as well.
        by_gradient = next(iter(self.attacks.values())).of_losses() is not None
        result = run(self.attacks, independent=self.independent, everyone=by_gradient)
        measures.classified.update(len(result.labels))
        measures.accuracy.update(result.clean, result.adversarial, result.labels)
        measures.success.update(result.clean, result.worst, result.labels)
        if measures.curve is not None:
            measures.curve.update(self._curve(run, result), result.labels)
        measures.classes.update(result)
        found = None
        if self.distances is not None and measures.distances is not None:
            found = self.distances.measure(batch, result, noise())
            measures.distances.update(found)
            on_attack(self.distances.attack.name, found > self.threat.eps)
        measures.seconds.update(attacks=time.perf_counter() - start)
        measurement = Measurement(result, found)
        wanted = self.features is not None or measures.examples is not None
        if wanted and batch.ranks.any(bool(result.attacked.any()), batch.inputs.device):
            self._observe(measures, batch, measurement)
        elif measures.examples is not None:
            measures.examples.skip(len(result.labels))
        return measurement

    def _observe(self, measures: Measures, batch: AttackedBatch, measurement: Measurement) -> None:
        """Update what is measured of the features and outputs on the adversarial inputs."""
        result, threat = measurement.worst_case, batch.site.threat
        right = result.attacked
        # The whole batch, because not every model accepts a part of a batch.
        observed = batch.observe(OUTPUTS if self.features is None else self.features, batch.inputs, result.inputs)
        (_, clean), (outputs, moved) = observed
        if measures.examples is None or result.labels.ndim > 1:
            measures.add_shift(clean[right], moved[right])
            return
        logits = logits_of(outputs)
        measures.add_shift(clean[right], moved[right], result.labels[right], logits.shape[1])
        pair = (threat.to_data(float32_or_better(inputs)) for inputs in (batch.inputs.detach(), result.inputs))
        margins = margins_of(logits, result.labels)
        measures.examples.update(samples_of(*measurement), right, margins, *pair)

    def _curve(self, run: Callable[..., WorstCase], result: WorstCase) -> list[Tensor]:
        """Predicted classes at every eps. Each eps attacks only the samples that are correct at all smaller ones."""
        assert self.epsilons is not None
        predicted = [result.clean]
        for eps in self.epsilons[1:]:
            left = predicted[-1] == result.labels
            if eps == self.threat.eps:
                found = result
            else:
                attacks = {name: attack.with_eps(eps) for name, attack in self.attacks.items()}
                found = run(attacks, samples=left.flatten(1).any(1) if left.ndim > 1 else left)
            predicted.append(torch.where(left, found.worst, predicted[-1]))
        return predicted


def check_max_batches(max_batches: int | None) -> None:
    """Refuse a number of batches below 1.

    Raises:
        ValueError: if it is below 1.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all, got {max_batches}.")


def check_examples(examples: int) -> int:
    """A number of examples.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative.
    """
    if isinstance(examples, bool) or not isinstance(examples, int):
        raise TypeError(f"examples must be an integer, such as 4, got a {type(examples).__name__}: {examples!r}.")
    if examples < 0:
        raise ValueError(f"examples must be 0 (none) or more, got {examples}.")
    return examples

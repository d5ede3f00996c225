"""The distances of all samples to the decision boundary, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense.attacks import MinimalAttack, ThreatModel, WorstCase, get_minimal_attack
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch
from lightning_wdefense.metrics import AccuracyCurve, area_under_accuracy_curve, distributional_accuracy
from lightning_wdefense.metrics._order import check_order
from lightning_wdefense.metrics._states import concatenated
from lightning_wdefense.modules.outputs import float32_or_better

POINTS = 21
"""Number of values of eps of an accuracy curve from distances, unless the user names them."""


class DistanceProtocol(NamedTuple):
    """How distances are measured.

    Attributes:
        attack: the minimum-norm attack.
        p: order of the Wasserstein distance of the distributional accuracy.
    """

    attack: MinimalAttack
    p: float

    @classmethod
    def of(cls, attack: str | MinimalAttack, threat: ThreatModel, p: float) -> DistanceProtocol:
        """The protocol that a user's arguments describe.

        Raises:
            TypeError: if ``attack`` is neither a name nor a minimum-norm attack.
            ValueError: if the attack is unknown, cannot search in the norm, or was made for another threat model; if ``p`` is below 1,
                or eps is 0.
        """
        found = get_minimal_attack(attack, threat) if isinstance(attack, str) else attack
        if not isinstance(found, MinimalAttack):
            raise TypeError(
                f"distances= takes the name of a minimum-norm attack, such as 'fmn', or a MinimalAttack, got a {type(found).__name__}: "
                f"{found!r}. For a bounded attack write MinimalEps(attack)."
            )
        if found.threat.with_eps(threat.eps) != threat:
            raise ValueError(
                f"The attack of distances= was made for {found.threat}, but threat={threat}: only eps may differ."
            )
        if not threat.eps > 0:
            raise ValueError("distances= needs a positive eps, the radius at which distributional_acc is measured.")
        return cls(found, check_order(p))

    def measure(self, batch: AttackedBatch, result: WorstCase, generator: torch.Generator) -> Tensor:
        """Distances of a batch ``(N,)`` in data units; what the attacks of the evaluation found counts as well.

        Args:
            batch: the batch, inside of its :meth:`~lightning_wdefense.evaluation.attacked_batch.AttackedBatch.ready`.
            result: what these attacks found.
            generator: the noise.

        Raises:
            ValueError: if the batch has not one ball for each label.
        """
        if result.labels.shape != batch.inputs.shape[:1]:
            raise ValueError(
                f"distances= needs one label and one perturbation for each sample, got labels {tuple(result.labels.shape)} and "
                f"perturbed values {tuple(batch.inputs.shape)}: for masks, tokens or several inputs use epsilons=."
            )
        threat = batch.site.threat
        found = self.attack.with_threat(threat)(batch.model, batch.inputs, batch.labels, generator=generator).distances
        fooled = (result.clean == result.labels) & (result.worst != result.labels)
        if threat.norm != "wasserstein":
            moved = threat.ball.length(
                threat.to_data(float32_or_better(result.inputs)) - threat.to_data(float32_or_better(batch.inputs))
            )
        else:
            moved = torch.full_like(found, threat.eps)
        return torch.where(fooled, torch.minimum(found, moved.clamp_max(threat.eps)), found)


class SampleDistances(Metric):
    """Keeps the distances of all samples, of all ranks."""

    full_state_update = False
    distances: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("distances", [], dist_reduce_fx="cat")

    def update(self, distances: Tensor) -> None:
        """Add the distances of a batch, ``(N,)``."""
        self.distances.append(distances.detach().float())

    def compute(self) -> Tensor:
        """All distances, in float32; empty before any update."""
        return concatenated(self.distances, self.device)


def summary(
    distances: Tensor, threat: ThreatModel, p: float, epsilons: Sequence[float]
) -> tuple[dict[str, Tensor], AccuracyCurve]:
    """Median distance, distributional accuracy at eps, and the accuracy curve; NaN where nothing was found at all.

    Args:
        distances: distances of all samples ``(N,)``.
        threat: the threat model.
        p: order of the Wasserstein distance.
        epsilons: values of eps for the curve, from 0.
    """
    places = torch.tensor(epsilons, dtype=distances.dtype, device=distances.device)
    if not len(distances) or bool(distances.isinf().all()):
        if len(distances):
            rank_zero_warn(
                "The minimum-norm attack found no adversarial input at all, which says more about the attack than about the model, so the "
                "values of distances= are NaN: take more steps, or look for vanishing gradients."
            )
        unknown = distances.new_tensor(torch.nan)
        curve = AccuracyCurve(places, torch.full_like(places, torch.nan), unknown)
        return {"median_distance": unknown, "distributional_acc": unknown}, curve
    # With the whole budget for each sample, the distributional accuracy is the pointwise one.
    accuracies = distributional_accuracy(distances, epsilons, p=torch.inf).accuracies
    return {
        "median_distance": distances.median(),
        "distributional_acc": distributional_accuracy(distances, [threat.eps], p=p).accuracies[0],
    }, AccuracyCurve(places, accuracies, area_under_accuracy_curve(epsilons, accuracies))

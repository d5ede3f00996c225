"""The terms of a robust training objective: the attack, the inputs of the training step, and the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks import PGD, Attack, Execution, ThreatModel
from lightning_wdefense.attacks.labels import class_labels
from lightning_wdefense.defenses.discrepancies import Discrepancy, get_discrepancy
from lightning_wdefense.defenses.losses.jacobian import Directions
from lightning_wdefense.defenses.losses.reweighting import SampleReweighting
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

Branch = Literal["clean", "adversarial"]


def mean_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy with hard or soft labels, the mean over the batch (and over pixels).

    Args:
        outputs: logits ``(N, K, ...)``, or a return value that contains them.
        labels: classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Returns:
        A scalar in float32 or better.
    """
    logits, labels = float32_or_better(logits_of(outputs)), class_labels(labels, outputs, check_values=True)
    return F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels)


LOSSES = ("ce", "margin", "kl")
"""Names of the attack losses that need logits."""


@dataclass(frozen=True)
class Terms:
    """What a :class:`~lightning_wdefense.defenses.Recipe` consists of, and what follows from it. The recipe documents the fields."""

    attack: Attack | None
    sees: Branch = "adversarial"
    discrepancy: str | Discrepancy | None = None
    weight: float = 0.0
    features: str = "outputs"
    other_weight: float = 0.0
    task_loss: Callable[[Any, Any], TensorResult] = mean_cross_entropy
    margin_weight: float = 0.0
    awp: float = 0.0
    reweighting: SampleReweighting | None = None
    jacobian_weight: float = 0.0
    jacobian_directions: Directions = "transport"
    execution: Execution | None = None
    ramp_steps: bool = False
    gather: bool = False
    warmup_epochs: float = 3.0
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.sees not in ("clean", "adversarial"):
            raise ValueError(f'sees must be "clean" or "adversarial", got {self.sees!r}.')
        for field in ("weight", "other_weight", "margin_weight", "awp", "jacobian_weight", "warmup_epochs"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}.")
        terms = (self.weight, self.other_weight, self.margin_weight, self.awp, self.jacobian_weight, self.reweighting)
        if self.attack is None and (self.sees == "adversarial" or any(terms)):
            raise ValueError(
                'attack=None gives no adversarial inputs, so it needs sees="clean", and all weights and awp must be 0, and reweighting None.'
            )
        if self.weight and self.discrepancy is None:
            raise ValueError(
                f'weight={self.weight} needs a discrepancy, but there is none: set discrepancy=, such as "sinkhorn".'
            )
        if self.discrepancy is not None:
            get_discrepancy(self.discrepancy)
        self._check_jacobian()
        if self.ramp_steps and not isinstance(self.attack, PGD):
            raise ValueError(f"ramp_steps=True needs PGD, whose number of steps can grow, got {self.attack!r}.")

    def _check_jacobian(self) -> None:
        if self.jacobian_directions not in get_args(Directions):
            raise ValueError(f'jacobian_directions must be "transport" or "random", got {self.jacobian_directions!r}.')
        if not self.jacobian_weight:
            return
        if self.sees == "clean":
            raise ValueError(
                f"jacobian_weight={self.jacobian_weight} differentiates the pass over the clean inputs, which sees='clean' leaves to "
                "training_step: set sees='adversarial'."
            )
        if self.jacobian_directions == "transport" and not self.weight:
            raise ValueError(
                'jacobian_directions="transport" are those in which the discrepancy moves the features, but weight=0: set weight= and '
                'discrepancy=, such as "sliced", or jacobian_directions="random".'
            )

    @property
    def threat(self) -> ThreatModel | None:
        """The attack's threat model."""
        return None if self.attack is None else self.attack.threat

    @property
    def eps(self) -> float:
        """The attack's perturbation budget eps, in data units; 0 without an attack."""
        return 0.0 if self.attack is None else self.attack.threat.eps

    @property
    def active(self) -> bool:
        """Whether the recipe changes the training. If not, training is exactly as without a recipe."""
        return self.needs("adversarial") or self.awp > 0

    def needs(self, branch: Branch) -> bool:
        """Whether the loss needs the model's outputs on the ``"clean"`` or on the ``"adversarial"`` inputs."""
        both = self.weight > 0 or self.other_weight > 0 or self.jacobian_weight > 0
        return both or self.sees == branch or (branch == "adversarial" and self.margin_weight > 0)

    @property
    def compares(self) -> bool:
        """Whether a term of the loss needs the model's outputs, beyond the loss of the user's own step."""
        weights = (self.weight, self.other_weight, self.margin_weight, self.jacobian_weight)
        return any(weight > 0 for weight in weights) or self.reweighting is not None

    @property
    def compares_classes(self) -> bool:
        """Whether a term of the loss, or the attack, needs logits of classes."""
        by_divergence = self.weight > 0 and self.discrepancy in ("kl", "weighted-kl")
        by_attack = self.attack is not None and self.attack.of_losses() is None
        by_weights = self.reweighting is not None and self.reweighting.loss is None
        return (
            by_divergence
            or by_weights
            or self.margin_weight > 0
            or (by_attack and getattr(self.attack, "loss", None) in LOSSES)
        )

    def attack_at(self, radius: float) -> Attack:
        """The attack with its eps multiplied by ``radius``, from 0 to 1 (the warm-up); with ``ramp_steps`` its steps as well."""
        attack = self.attack
        assert attack is not None
        if self.ramp_steps and isinstance(attack, PGD):
            steps = max(1, math.ceil(radius * attack.steps))
            # Fewer steps cover the same distance in total.
            step_size = None if attack.step_size is None else attack.step_size * attack.steps / steps
            attack = replace(attack, steps=steps, step_size=step_size)
        return attack if radius == 1.0 else attack.with_eps(attack.threat.eps * radius)


class RecipeChanges(TypedDict, total=False):
    """Fields of :class:`Recipe`, all but its name.

    Type checkers check them in ``Recipe.named("trades", threat, weight=3.0)``, and jsonargparse builds attacks and other objects
    in YAML from them.
    """

    attack: Attack | None
    sees: Branch
    discrepancy: str | Discrepancy | None
    weight: float
    features: str
    other_weight: float
    task_loss: Callable[[Any, Any], TensorResult]
    margin_weight: float
    awp: float
    reweighting: SampleReweighting | None
    jacobian_weight: float
    jacobian_directions: Directions
    execution: Execution | None
    ramp_steps: bool
    gather: bool
    warmup_epochs: float

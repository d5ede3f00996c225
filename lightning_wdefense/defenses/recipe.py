"""A way to train robustly, as data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks import (
    FGSM,
    PGD,
    Attack,
    Execution,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    SoftBallPGD,
    ThreatModel,
    WassersteinAttack,
)
from lightning_wdefense.attacks.labels import class_labels
from lightning_wdefense.attacks.threat import check_threat
from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.defenses.discrepancies import Discrepancy, get_discrepancy
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

Branch = Literal["clean", "adversarial"]


def mean_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy with hard or soft labels, the mean over the batch (and over pixels)."""
    logits, labels = float32_or_better(logits_of(outputs)), class_labels(labels, outputs, check_values=True)
    return F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels)


LOSSES = ("ce", "margin", "kl")
"""Losses by name, all of which read logits."""


@dataclass(frozen=True)
class Recipe:
    """What a robust training step minimises: ``step(seen) + other_weight * task(other) + weight * discrepancy``.

    Args:
        attack: makes the adversarial inputs; ``None`` for none.
        sees: which inputs the user's own ``training_step`` is given, ``"clean"`` or ``"adversarial"``. The other ones get a
            plain forward pass, where a term needs it.
        discrepancy: between clean and adversarial features: ``"kl"``, ``"paired-l2"``, ``"sinkhorn"``, ``"sinkhorn-label"``,
            any other name in ``DISCREPANCIES``, a :class:`~lightning_wdefense.transport.SinkhornDivergence`,
            :class:`~lightning_wdefense.transport.SlicedWasserstein` or :class:`CriticDiscrepancy`, or a callable
            ``(clean, adversarial, labels)``.
        weight: of the discrepancy.
        features: where it is measured: ``"outputs"``, ``"penultimate"`` (the input of the last linear layer that runs), or a
            dotted path to a submodule.
        other_weight: of the task loss on the inputs that ``training_step`` does not see.
        task_loss: ``(outputs, labels) -> scalar`` for that term, and for ``awp``.
        margin_weight: of ``-log(1 - max_{k != y} p_k)`` on the adversarial outputs, the second half of MART's boosted cross-entropy.
        awp: size of the adversarial weight perturbation (Wu et al., 2020), in multiples of each weight's norm; 0 for none, 0.005 to
            0.01 in the paper. The step's gradient is taken at weights moved uphill by so much, which costs about one more training
            step without the attack. ``task_loss`` stands in for the loss in ``training_step``, which runs only once.
        execution: how the model is run inside the attack, such as ``Execution(precision="bf16")``; ``None`` for as it is.
        ramp_steps: in the warm-up let the attack's number of steps grow with its radius, which saves time.
        warmup_epochs: the attack's radius grows linearly from 0 over so many epochs, counted in the batches that were defended:
            neither accumulation nor several optimizers change it, and a training that began without the defense has all of it. Training at a large radius from the start collapses to a constant output.
        name: for logs and messages.

    Raises:
        ValueError: if a value is unknown or negative, or a term needs an attack and there is none.

    Example:
        >>> Recipe.named("trades", ThreatModel(eps=0.1)).weight
        6.0
    """

    attack: Attack | None
    sees: Branch = "adversarial"
    discrepancy: str | Discrepancy | None = None
    weight: float = 0.0
    features: str = "outputs"
    other_weight: float = 0.0
    task_loss: Callable[[Any, Any], Tensor] = mean_cross_entropy
    margin_weight: float = 0.0
    awp: float = 0.0
    execution: Execution | None = None
    ramp_steps: bool = False
    warmup_epochs: float = 3.0
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.sees not in ("clean", "adversarial"):
            raise ValueError(f'sees must be "clean" or "adversarial", got {self.sees!r}.')
        for field in ("weight", "other_weight", "margin_weight", "awp", "warmup_epochs"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}.")
        terms = (self.weight, self.other_weight, self.margin_weight, self.awp)
        if self.attack is None and (self.sees == "adversarial" or any(terms)):
            raise ValueError('Without an attack there are no adversarial inputs: sees="clean", all weights and awp 0.')
        if self.weight and self.discrepancy is None:
            raise ValueError(f"weight={self.weight} needs a discrepancy=.")
        if self.discrepancy is not None:
            get_discrepancy(self.discrepancy)
        if self.ramp_steps and not isinstance(self.attack, PGD):
            raise ValueError(f"ramp_steps=True needs PGD, whose steps can be fewer, got {self.attack!r}.")

    @property
    def threat(self) -> ThreatModel | None:
        """The attack's threat model."""
        return None if self.attack is None else self.attack.threat

    @property
    def eps(self) -> float:
        """The attack's full radius, in data units; 0 without an attack."""
        return 0.0 if self.attack is None else self.attack.threat.eps

    @property
    def active(self) -> bool:
        """Whether the recipe changes anything: otherwise training is exactly as without it."""
        return self.needs("adversarial") or self.awp > 0

    def needs(self, branch: Branch) -> bool:
        """Whether the loss needs the model's outputs on the clean, or on the adversarial inputs."""
        both = self.weight > 0 or self.other_weight > 0
        return both or self.sees == branch or (branch == "adversarial" and self.margin_weight > 0)

    @property
    def compares(self) -> bool:
        """Whether a term of the loss reads what the model returned, and not only the user's own step."""
        return self.weight > 0 or self.other_weight > 0 or self.margin_weight > 0

    @property
    def compares_classes(self) -> bool:
        """Whether a term of the loss, or the attack, reads outputs as logits of classes."""
        by_divergence = self.weight > 0 and self.discrepancy in ("kl", "weighted-kl")
        by_attack = self.attack is not None and self.attack.of_losses() is None
        return by_divergence or self.margin_weight > 0 or (by_attack and getattr(self.attack, "loss", None) in LOSSES)

    def attack_at(self, radius: float) -> Attack:
        """The attack with its eps multiplied by ``radius`` (the warm-up), and its steps as well where they ramp."""
        attack = self.attack
        assert attack is not None
        if self.ramp_steps and isinstance(attack, PGD):
            steps = max(1, math.ceil(radius * attack.steps))
            # Fewer steps go as far together.
            step_size = None if attack.step_size is None else attack.step_size * attack.steps / steps
            attack = replace(attack, steps=steps, step_size=step_size)
        return attack if radius == 1.0 else attack.with_eps(attack.threat.eps * radius)

    @classmethod
    def named(cls, name: str, threat: ThreatModel, **changes: Any) -> Recipe:
        """A published recipe by its name, for a threat model.

        ====================== =====================================================================================
        ``standard``           ``CE(f(x), y)``: the user's training as it is
        ``pgd-at``             ``CE(f(x'), y)`` (Madry et al., 2018)
        ``fast-at``            the same with one step from noise of twice the radius, N-FGSM (de Jorge et al., 2022)
        ``trades``             ``CE(f(x), y) + 6 KL(f(x) || f(x'))`` (Zhang et al., 2019)
        ``mart``               ``BCE(f(x'), y) + 5 KL(f(x) || f(x')) (1 - p_y(x))`` (Wang et al., 2020)
        ``alp``                ``CE(f(x'), y) + 1 paired L2`` of logits (Kannan et al., 2018; adversarial batch only)
        ``alp-features``       ``CE(f(x'), y) + 0.1 paired L2`` of penultimate features
        ``sat``                ``CE(f(x'), y) + 1 Sinkhorn divergence`` of logits (Bouniot et al., 2020)
        ``sat-label``          the same, with a ground cost that keeps mass within its class
        ``sat-features``       ``CE(f(x'), y) + 0.1 Sinkhorn divergence`` of penultimate features
        ``class-transport``    ``CE(f(x'), y) + 0.1 entropic transport within the classes`` of penultimate features (ours)
        ``critic``             ``CE(f(x'), y) + 0.1 W_1`` of each class's penultimate features, by a critic (the WGAN route)
        ``mmd``                ``CE(f(x'), y) + 1 MMD^2`` of logits, five Gaussian kernels (as in Song et al., 2019)
        ``coral``              ``CE(f(x'), y) + 1 |difference of covariances|^2 / 4D^2`` of logits (as in Song et al., 2019)
        ``udr``                ``CE(f(x'), y)``, ``x'`` from a soft ball whose pull is learned (Bui et al., 2022)
        ``wrm``                ``CE(f(x'), y)``, ``x'`` maximises ``CE - gamma |x' - x|^2`` (Sinha et al., 2018)
        ``sinkhorn-dro``       ``T log mean_m exp(CE(f(x + noise_m), y) / T)``, no attack (Wang et al., 2021)
        ``feature-scattering`` ``CE(f(x'), y)``, ``x'`` maximises the transport cost of logits (Zhang and Wang, 2019);
                               **fails under AutoAttack** and warns of it
        ====================== =====================================================================================

        ``BCE`` is MART's boosted cross-entropy, ``CE - log(1 - max_{k != y} p_k)``. Paired L2 is ``mean |z_i - z'_i|^2 / 2``, the transport cost of the identity coupling, so that each ``alp`` is the
        ablation of a ``sat``. The attack is PGD with 10 steps; under the Wasserstein norm, which ``fast-at``,
        ``udr``, ``wrm``, ``sinkhorn-dro`` and ``feature-scattering`` do not take, 5 steps of projected ascent by :class:`WassersteinAttack`.

        Args:
            name: one of the above.
            threat: what the attacker may do.
            **changes: fields of the recipe to replace, such as ``weight=0.3`` or ``attack=PGD(threat, steps=7)``.

        Raises:
            TypeError: if ``threat`` is no threat model.
            ValueError: if the name does not exist, with the nearest ones, or its attack does not take the threat's norm.
        """
        check_threat(threat, f"Recipe {name!r}")
        if name not in RECIPES:
            raise ValueError(unknown_name("recipe", name, RECIPES))
        return replace(RECIPES[name](threat), name=name, **changes)


def _adversary(threat: ThreatModel, loss: Literal["ce", "kl"] = "ce") -> Attack:
    if threat.norm == "wasserstein":
        return WassersteinAttack(threat, steps=5, methods=("projected",), restarts=1, loss=loss)
    return PGD(threat, loss=loss, random_start="gaussian" if loss == "kl" else True)


def _feature_scattering(threat: ThreatModel) -> Recipe:
    warnings.warn(
        'Recipe "feature-scattering" fails under AutoAttack: models that looked 60% robust under PGD were 37% robust (CIFAR-10). It is '
        "there to be compared with; choose another one for a model that must be robust.",
        stacklevel=3,
    )
    return Recipe(FeatureScattering(threat))


RECIPES: dict[str, Callable[[ThreatModel], Recipe]] = {
    "standard": lambda threat: Recipe(None, "clean"),
    "pgd-at": lambda threat: Recipe(_adversary(threat)),
    "fast-at": lambda threat: Recipe(FGSM(threat, noise=2.0)),
    "trades": lambda threat: Recipe(_adversary(threat, "kl"), "clean", "kl", 6.0),
    "mart": lambda threat: Recipe(_adversary(threat), discrepancy="weighted-kl", weight=5.0, margin_weight=1.0),
    "alp": lambda threat: Recipe(_adversary(threat), discrepancy="paired-l2", weight=1.0),
    "alp-features": lambda threat: Recipe(
        _adversary(threat), discrepancy="paired-l2", weight=0.1, features="penultimate"
    ),
    "sat": lambda threat: Recipe(_adversary(threat), discrepancy="sinkhorn", weight=1.0),
    "sat-label": lambda threat: Recipe(_adversary(threat), discrepancy="sinkhorn-label", weight=1.0),
    "sat-features": lambda threat: Recipe(
        _adversary(threat), discrepancy="sinkhorn", weight=0.1, features="penultimate"
    ),
    "class-transport": lambda threat: Recipe(
        _adversary(threat), discrepancy="class-transport", weight=0.1, features="penultimate"
    ),
    "critic": lambda threat: Recipe(
        _adversary(threat), discrepancy=CriticDiscrepancy(), weight=0.1, features="penultimate"
    ),
    "mmd": lambda threat: Recipe(_adversary(threat), discrepancy="mmd", weight=1.0),
    "coral": lambda threat: Recipe(_adversary(threat), discrepancy="coral", weight=1.0),
    "udr": lambda threat: Recipe(SoftBallPGD(threat)),
    "wrm": lambda threat: Recipe(LagrangianAttack(threat)),
    "sinkhorn-dro": lambda threat: Recipe(GibbsNoise(threat)),
    "feature-scattering": _feature_scattering,
}
"""Every recipe that has a name."""

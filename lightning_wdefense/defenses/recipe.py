"""Recipes: robust training objectives by name, and the defense that a recipe makes of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from typing_extensions import Unpack

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks import (
    FGSM,
    PGD,
    Attack,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    SharedBudgetPGD,
    SoftBallPGD,
    ThreatModel,
    WassersteinAttack,
)
from lightning_wdefense.attacks.threat import check_threat
from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.terms import RecipeChanges, Terms
from lightning_wdefense.modules.outputs import Pick, output_picker


@dataclass(frozen=True)
class Recipe(Terms):
    """The objective of a robust training step: ``step(seen) + other_weight * task(other) + weight * discrepancy``.

    Args:
        attack: makes the adversarial inputs; ``None`` for no attack.
        sees: the inputs of the user's own ``training_step``, ``"clean"`` or ``"adversarial"``. The other inputs get a plain forward
            pass if a term needs it.
        discrepancy: the discrepancy between clean and adversarial features: ``"kl"``, ``"paired-l2"``, ``"sinkhorn"``,
            ``"sinkhorn-label"``, any other name in ``DISCREPANCIES``, a
            :class:`~lightning_wdefense.transport.SinkhornDivergence`, :class:`~lightning_wdefense.transport.SlicedWasserstein` or
            :class:`CriticDiscrepancy`, or a callable ``(clean, adversarial, labels) -> scalar``.
        weight: weight of the discrepancy.
        features: the features that the discrepancy compares: ``"outputs"``, ``"penultimate"`` (the input of the last linear layer
            that runs), or a dotted path to a submodule.
        other_weight: weight of the task loss on the inputs that ``training_step`` does not get.
        task_loss: ``(outputs, labels) -> scalar``, the task loss for that term and for ``awp``.
        margin_weight: weight of ``-log(1 - max_{k != y} p_k)`` on the adversarial outputs, the second term of MART's boosted
            cross-entropy.
        awp: size of the adversarial weight perturbation (Wu et al., 2020), in multiples of each weight's norm; 0 for none. The
            paper uses 0.005 to 0.01. The gradient of the training step is taken at the perturbed weights. This costs about as much
            as one more training step without the attack. The perturbation uses ``task_loss`` instead of the loss of
            ``training_step``, which runs only once.
        reweighting: :class:`SampleReweighting`, which gives samples with a large loss a larger weight; ``None`` for equal weights.
        jacobian_weight: weight of the squared slope of the features in the clean inputs, in data units, for one direction of the features
            for each sample. It needs ``sees="adversarial"``, and differentiates the model twice.
        jacobian_directions: ``"transport"`` for the direction in which the discrepancy moves the adversarial features of the sample,
            ``"random"`` for a random one, whose expected squared slope is the squared Frobenius norm of the Jacobian.
        execution: how the attack runs the model, such as ``Execution(precision="bf16")``; ``None`` for no change.
        gather: under several processes (DDP, FSDP2), compare the samples of all of them, so that the discrepancy and its gradient are
            those of one process with the whole batch. Otherwise each process compares its own samples. See
            ``docs/distributed.md`` for what it costs.
        ramp_steps: in the warm-up, increase the attack's number of steps with eps, which saves time.
        warmup_epochs: number of epochs over which the attack's eps grows linearly from 0. It is counted in defended batches, so
            gradient accumulation and several optimizers do not change it. A training that began without the defense still gets the
            whole warm-up. Training at a large eps from the start can collapse to a constant output.
        name: name for logs and messages.

    Raises:
        ValueError: if a value is unknown or negative, or a term needs an attack and there is none.

    Example:
        >>> Recipe.named("trades", ThreatModel(eps=0.1)).weight
        6.0
    """

    @classmethod
    def named(cls, name: str, threat: ThreatModel, **changes: Unpack[RecipeChanges]) -> Recipe:
        """A recipe by its name, for a threat model. ``x'`` are adversarial inputs, ``f`` is the model.

        ====================== =====================================================================================
        ``standard``           ``CE(f(x), y)``: the user's training, unchanged
        ``pgd-at``             ``CE(f(x'), y)`` (Madry et al., 2018)
        ``fast-at``            the same with one step from noise of twice the budget, N-FGSM (de Jorge et al., 2022)
        ``trades``             ``CE(f(x), y) + 6 KL(f(x) || f(x'))`` (Zhang et al., 2019)
        ``mart``               ``BCE(f(x'), y) + 5 KL(f(x) || f(x')) (1 - p_y(x))`` (Wang et al., 2020)
        ``alp``                ``CE(f(x'), y) + 1 paired L2`` of logits (Kannan et al., 2018; adversarial batch only)
        ``alp-features``       ``CE(f(x'), y) + 0.1 paired L2`` of penultimate features
        ``sat``                ``CE(f(x'), y) + 1 Sinkhorn divergence`` of logits (Bouniot et al., 2020)
        ``sat-label``          the same, with a label cost that keeps transport within each class
        ``sat-features``       ``CE(f(x'), y) + 0.1 Sinkhorn divergence`` of penultimate features
        ``class-transport``    ``CE(f(x'), y) + 0.1 entropic transport within the classes`` of penultimate features (ours)
        ``critic``             ``CE(f(x'), y) + 0.1 W_1`` of each class's penultimate features, by a critic (as in WGAN)
        ``mmd``                ``CE(f(x'), y) + 1 MMD^2`` of logits, five Gaussian kernels (as in Song et al., 2019)
        ``coral``              ``CE(f(x'), y) + 1 |difference of covariances|^2 / 4D^2`` of logits (as in Song et al., 2019)
        ``otjr``               ``CE(f(x'), y) + 10 sliced transport`` of logits ``+ 0.01`` their squared slope along it (as in Le et al.,
                               2024)
        ``distributional-at``  ``CE(f(x'), y)``, ``x'`` with a budget that the batch shares, ``W_2`` (Bai et al., 2023)
        ``distributional-trades`` ``CE(f(x), y) + 6 KL(f(x) || f(x'))``, ``x'`` likewise (as in Bai et al., 2025)
        ``udr``                ``CE(f(x'), y)``, ``x'`` from a soft ball with a learned multiplier (Bui et al., 2022)
        ``wrm``                ``CE(f(x'), y)``, ``x'`` maximises ``CE - gamma |x' - x|^2`` (Sinha et al., 2018)
        ``sinkhorn-dro``       ``T log mean_m exp(CE(f(x + noise_m), y) / T)``, no attack (Wang et al., 2021)
        ``feature-scattering`` ``CE(f(x'), y)``, ``x'`` maximises the transport cost of logits (Zhang and Wang, 2019);
                               **fails under AutoAttack**; a warning says so
        ====================== =====================================================================================

        ``BCE`` is MART's boosted cross-entropy, ``CE - log(1 - max_{k != y} p_k)``. Paired L2 is ``mean |z_i - z'_i|^2 / 2``, the
        transport cost of the identity coupling. So each ``alp`` recipe is the ablation of a ``sat`` recipe.

        The attack is PGD with 10 steps. For the Wasserstein norm it is :class:`WassersteinAttack` with 5 steps of projected gradient
        ascent; ``fast-at``, ``udr``, ``wrm``, ``sinkhorn-dro``, ``feature-scattering`` and the ``distributional`` ones do not
        support this norm.

        Args:
            name: one of the names above.
            threat: the threat model.
            **changes: fields of the recipe to replace, such as ``weight=0.3`` or ``attack=PGD(threat, steps=7)``.

        Raises:
            TypeError: if ``threat`` is no threat model.
            ValueError: if the name does not exist (the message lists the nearest names), or its attack does not support the norm.

        Example:
            >>> recipe = Recipe.named("sat", ThreatModel(eps=8 / 255), weight=0.5)
            >>> recipe.discrepancy, recipe.weight
            ('sinkhorn', 0.5)
        """
        check_threat(threat, f"Recipe {name!r}")
        if name not in RECIPES:
            raise ValueError(unknown_name("recipe", name, RECIPES))
        return replace(RECIPES[name](threat), name=name, **changes)

    def bind(
        self,
        model: nn.Module,
        *,
        outputs: Pick = None,
        seed: int = 0,
        warmup_steps: float = 0.0,
    ) -> Defense:
        """The recipe at work on a model, in a training loop of your own: Fabric, accelerate, Hugging Face or plain PyTorch.

        ``defense(inputs, labels)`` attacks a batch and returns the loss to minimise, see
        :meth:`~lightning_wdefense.defenses.defense.Defense.__call__`. The callback and the mixin work in the same way, so equal seeds
        give equal models. Save ``defense.state_dict()`` in your checkpoints. Where torch.distributed has a process group, all
        its ranks train one model.

        Args:
            model: takes the inputs and returns logits. Wrap it first (``DistributedDataParallel``, ``fabric.setup``,
                ``accelerator.prepare``, ``torch.compile``) and bind the result.
            outputs: key, position or callable that finds the logits in the model's return value. ``"logits"`` and ``"out"`` are
                found without it.
            seed: seed of the attack's noise.
            warmup_steps: number of batches over which the attack's eps grows linearly from 0; 0 for none. The recipe's
                ``warmup_epochs`` does not count here, since only a Trainer knows how long an epoch is.

        Raises:
            TypeError: if the model is no module, or its parameters are sharded in a way that an attack cannot work with.
            ValueError: if the recipe's features name no submodule, or ``warmup_steps`` is negative.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> defense = Recipe.named("pgd-at", ThreatModel(eps=0.1)).bind(model, warmup_steps=2)
            >>> for inputs, labels in [(torch.rand(8, 4), torch.arange(8) % 3)] * 2:
            ...     optimizer.zero_grad()
            ...     output = defense(inputs, labels)
            ...     output.loss.backward()
            ...     optimizer.step()
            >>> output.logs["eps"], defense.state_dict()["batches"]
            (0.1, 2)
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"A recipe is bound to an nn.Module, got a {type(model).__name__}.")
        return Defense(self, model, output_picker(outputs), seed=seed, warmup_steps=warmup_steps)


def _training_attack(threat: ThreatModel, loss: Literal["ce", "kl"] = "ce") -> Attack:
    if threat.norm == "wasserstein":
        return WassersteinAttack(threat, steps=5, methods=("projected",), restarts=1, loss=loss)
    return PGD(threat, loss=loss, random_start="gaussian" if loss == "kl" else True)


def _feature_scattering(threat: ThreatModel) -> Recipe:
    warnings.warn(
        'Recipe "feature-scattering" fails under AutoAttack: models with 60% robust accuracy under PGD had 37% under AutoAttack '
        "(CIFAR-10). Use it for comparison only, and choose another recipe for a model that must be robust.",
        stacklevel=3,
    )
    return Recipe(FeatureScattering(threat))


RECIPES: dict[str, Callable[[ThreatModel], Recipe]] = {
    "standard": lambda threat: Recipe(None, "clean"),
    "pgd-at": lambda threat: Recipe(_training_attack(threat)),
    "fast-at": lambda threat: Recipe(FGSM(threat, noise=2.0)),
    "trades": lambda threat: Recipe(_training_attack(threat, "kl"), "clean", "kl", 6.0),
    "mart": lambda threat: Recipe(_training_attack(threat), discrepancy="weighted-kl", weight=5.0, margin_weight=1.0),
    "alp": lambda threat: Recipe(_training_attack(threat), discrepancy="paired-l2", weight=1.0),
    "alp-features": lambda threat: Recipe(
        _training_attack(threat), discrepancy="paired-l2", weight=0.1, features="penultimate"
    ),
    "sat": lambda threat: Recipe(_training_attack(threat), discrepancy="sinkhorn", weight=1.0),
    "sat-label": lambda threat: Recipe(_training_attack(threat), discrepancy="sinkhorn-label", weight=1.0),
    "sat-features": lambda threat: Recipe(
        _training_attack(threat), discrepancy="sinkhorn", weight=0.1, features="penultimate"
    ),
    "class-transport": lambda threat: Recipe(
        _training_attack(threat), discrepancy="class-transport", weight=0.1, features="penultimate"
    ),
    "critic": lambda threat: Recipe(
        _training_attack(threat), discrepancy=CriticDiscrepancy(), weight=0.1, features="penultimate"
    ),
    "mmd": lambda threat: Recipe(_training_attack(threat), discrepancy="mmd", weight=1.0),
    "coral": lambda threat: Recipe(_training_attack(threat), discrepancy="coral", weight=1.0),
    "otjr": lambda threat: Recipe(_training_attack(threat), discrepancy="sliced", weight=10.0, jacobian_weight=0.01),
    "distributional-at": lambda threat: Recipe(SharedBudgetPGD(threat)),
    "distributional-trades": lambda threat: Recipe(
        SharedBudgetPGD(threat, loss="kl", random_start="gaussian"), "clean", "kl", 6.0
    ),
    "udr": lambda threat: Recipe(SoftBallPGD(threat)),
    "wrm": lambda threat: Recipe(LagrangianAttack(threat)),
    "sinkhorn-dro": lambda threat: Recipe(GibbsNoise(threat)),
    "feature-scattering": _feature_scattering,
}
"""All recipes by name, as functions of the threat model."""

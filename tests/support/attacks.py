"""The table of attacks that drives the contract tests: a new attack joins by one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from lightning_wdefense.attacks import (
    APGD,
    DDN,
    FAB,
    FGSM,
    FMN,
    PGD,
    Attack,
    AutoAttack,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    MinimalAttack,
    MinimalEps,
    SharedBudgetPGD,
    SinkhornAttack,
    SoftBallPGD,
    Square,
    ThreatModel,
    TorchAttack,
    WassersteinAttack,
    get_attack,
)


def square_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss of the user's own, at module level so that it can be pickled."""
    return (outputs - torch.nn.functional.one_hot(labels, outputs.shape[1])).square()


@dataclass(frozen=True)
class AttackCase:
    """How to build a small attack for a threat model, and what to expect of it.

    ``noisy``: another seed gives another result. ``own``: ours, so it takes ``bounds=None``, any task and float16 gradients.
    ``differentiates``: needs gradients. ``labelled``: maximises a loss of the labels. ``scaled``: moves as far however small the
    gradient. ``searches``: looks for the closest adversarial inputs, whatever eps is. ``transports``: moves the mass of images, under
    the Wasserstein norm whichever is asked for. ``shares``: has one budget for the batch, so it needs two samples.
    ``l1``: works in that norm too.
    """

    build: Callable[[ThreatModel], Attack]
    noisy: bool = True
    own: bool = True
    differentiates: bool = True
    labelled: bool = True
    scaled: bool = True
    transports: bool = False
    searches: bool = False
    l1: bool = True
    shares: bool = False

    def __call__(self, threat: ThreatModel) -> Attack:
        return self.build(self.threat(threat))

    def threat(self, threat: ThreatModel) -> ThreatModel:
        """What it is built for."""
        return replace(threat, norm="wasserstein") if self.transports else threat

    def shape(self, features: int) -> tuple[int, ...]:
        """Of inputs with about so many values that need be nothing in particular."""
        side = max(isqrt(features), 3)
        return (1, side, side) if self.transports else (features,)

    def knows(self, norm: str) -> bool:
        """Whether it works in this norm."""
        return norm != "l1" or (self.own and self.l1 and not self.transports)

    def takes(self, shape: tuple[int, ...], samples: int = 2) -> bool:
        """Whether inputs of this shape, each, are for it, and so many of them."""
        if self.shares and samples < 2:
            return False
        return not self.transports or (len(shape) == 3 and min(shape[1:]) >= 3)


ATTACK_CASES = {
    "fgsm": AttackCase(FGSM, noisy=False),
    "n-fgsm": AttackCase(lambda threat: get_attack("n-fgsm", threat)),
    "pgd": AttackCase(lambda threat: PGD(threat, steps=3)),
    "pgd-restarts": AttackCase(lambda threat: PGD(threat, steps=2, restarts=3)),
    "pgd-early-exit": AttackCase(lambda threat: PGD(threat, steps=3, early_exit=True)),
    "pgd-kl": AttackCase(lambda threat: PGD(threat, steps=3, loss="kl", random_start="gaussian"), labelled=False),
    "pgd-margin": AttackCase(lambda threat: PGD(threat, steps=3, loss="margin", random_start=False), noisy=False),
    "pgd-callable": AttackCase(lambda threat: PGD(threat, steps=3, loss=square_error, restarts=2)),
    "soft-ball-pgd": AttackCase(lambda threat: SoftBallPGD(threat, steps=3, multiplier=0.5)),
    "lagrangian": AttackCase(lambda threat: LagrangianAttack(threat, steps=3), noisy=False, scaled=False),
    "shared-budget-pgd": AttackCase(lambda threat: SharedBudgetPGD(threat, steps=3), shares=True),
    "shared-budget-pgd-clip": AttackCase(
        lambda threat: SharedBudgetPGD(threat, steps=5, loss="margin", clip=0.1, random_start=False),
        noisy=False,
        shares=True,
    ),
    "shared-budget-pgd-kl": AttackCase(
        lambda threat: SharedBudgetPGD(threat, p=3, steps=3, loss="kl", random_start="gaussian"),
        labelled=False,
        shares=True,
    ),
    "feature-scattering": AttackCase(FeatureScattering, labelled=False),
    "gibbs-noise": AttackCase(lambda threat: GibbsNoise(threat, temperature=0.01), differentiates=False),
    "sinkhorn": AttackCase(lambda threat: SinkhornAttack(threat, steps=3)),
    "wasserstein": AttackCase(
        lambda threat: WassersteinAttack(threat, steps=3, neighbourhood=3, restarts=1), noisy=False, transports=True
    ),
    "wasserstein-kl": AttackCase(
        lambda threat: WassersteinAttack(threat, steps=2, neighbourhood=3, loss="kl"), labelled=False, transports=True
    ),
    "wasserstein-early-exit": AttackCase(
        lambda threat: WassersteinAttack(threat, 4, "frank-wolfe", neighbourhood=3, p=2, restarts=1, early_exit=True),
        noisy=False,
        transports=True,
    ),
    "torchattacks-pgd": AttackCase(
        lambda threat: TorchAttack("PGDL2" if threat.norm == "l2" else "PGD", threat, steps=3), own=False
    ),
    "torchattacks-apgd": AttackCase(lambda threat: TorchAttack("APGD", threat, steps=3), own=False),
    "torchattacks-square": AttackCase(
        lambda threat: TorchAttack("Square", threat, n_queries=10), own=False, differentiates=False
    ),
    "apgd-ce": AttackCase(lambda threat: APGD(threat, steps=3), l1=False),
    "apgd-t": AttackCase(lambda threat: APGD(threat, steps=3, loss="dlr-targeted"), l1=False),
    "fab-t": AttackCase(lambda threat: FAB(threat, steps=2), noisy=False, l1=False),
    "apgd-dlr": AttackCase(lambda threat: APGD(threat, steps=5, loss="dlr", restarts=2), l1=False),
    "square": AttackCase(lambda threat: Square(threat, queries=10), differentiates=False, l1=False),
    "autoattack": AttackCase(lambda threat: AutoAttack(threat, steps=3, queries=10), l1=False),
}


@dataclass(frozen=True)
class FoundInputs:
    """A minimum-norm attack as an attack: it returns the adversarial inputs alone."""

    attack: MinimalAttack
    bounded = False

    @property
    def threat(self) -> ThreatModel:
        return self.attack.threat

    def __call__(self, *arguments, **options) -> Tensor:
        return self.attack(*arguments, **options).inputs


ATTACK_CASES |= {
    "fmn": AttackCase(
        lambda threat: FoundInputs(FMN(threat, steps=4, tightening=2)), noisy=False, scaled=False, searches=True
    ),
    "ddn": AttackCase(
        lambda threat: FoundInputs(DDN(replace(threat, norm="l2"), steps=4, tightening=2)),
        noisy=False,
        scaled=False,
        searches=True,
    ),
    "minimal-pgd": AttackCase(
        lambda threat: FoundInputs(MinimalEps(PGD(threat, steps=3), tolerance=0.5)), scaled=False, searches=True
    ),
}

OWN_CASES = {name: case for name, case in ATTACK_CASES.items() if case.own}
EPS_CASES = {name: case for name, case in ATTACK_CASES.items() if not case.searches}

"""Attacks by name, for configuration files and string arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_wdefense._names import resolved, unknown_name
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.gradient.feature_scattering import FeatureScattering
from lightning_wdefense.attacks.gradient.fgsm import FGSM
from lightning_wdefense.attacks.gradient.gibbs_noise import GibbsNoise
from lightning_wdefense.attacks.gradient.lagrangian import LagrangianAttack
from lightning_wdefense.attacks.gradient.pgd import PGD
from lightning_wdefense.attacks.gradient.shared_budget import SharedBudgetPGD
from lightning_wdefense.attacks.gradient.sinkhorn import SinkhornAttack
from lightning_wdefense.attacks.gradient.soft_ball import SoftBallPGD
from lightning_wdefense.attacks.minimal.registry import MINIMAL_ATTACKS
from lightning_wdefense.attacks.standard.apgd import APGD
from lightning_wdefense.attacks.standard.autoattack import AutoAttack
from lightning_wdefense.attacks.standard.fab import FAB
from lightning_wdefense.attacks.standard.square import Square
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.attacks.wasserstein.attack import WassersteinAttack

Attacks = Sequence[str | Attack] | Mapping[str, str | Attack]
"""Several attacks: names, attacks, or a mapping from your own names to either."""

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "n-fgsm": lambda threat, **options: FGSM(threat, **{"noise": 2.0} | options),
    "pgd": PGD,
    "soft-ball-pgd": SoftBallPGD,
    "shared-budget-pgd": SharedBudgetPGD,
    "lagrangian": LagrangianAttack,
    "feature-scattering": FeatureScattering,
    "gibbs-noise": GibbsNoise,
    "sinkhorn": SinkhornAttack,
    "wasserstein": WassersteinAttack,
    "autoattack": AutoAttack,
    "apgd": APGD,
    "apgd-ce": partial(APGD, loss="ce"),
    "apgd-dlr": partial(APGD, loss="dlr"),
    "apgd-t": partial(APGD, loss="dlr-targeted"),
    "fab": FAB,
    "fab-t": FAB,
    "square": Square,
}
"""All attacks by name; each is called with the threat model and the attack's own options."""


def get_attack(name: str, threat: ThreatModel, **options: Any) -> Attack:
    """Make an attack from its name.

    Args:
        name: one of ``ATTACKS``. For other attacks of torchattacks use ``TorchAttack("Name", threat)``.
        threat: the threat model.
        **options: arguments of the attack's constructor.

    Returns:
        The attack.

    Raises:
        TypeError: if ``threat`` is not a threat model.
        ValueError: if the name is unknown; the message lists the most similar ones.

    Example:
        >>> get_attack("pgd", ThreatModel(eps=0.1), steps=20).steps
        20
    """
    if name in MINIMAL_ATTACKS:
        raise ValueError(
            f"{name!r} is a minimum-norm attack, which finds distances: use distances={name!r} of RobustnessMonitor and evaluate, or "
            f"get_minimal_attack({name!r}, threat)."
        )
    if name not in ATTACKS:
        raise ValueError(unknown_name("attack", name, ATTACKS))
    check_threat(threat, f"Attack {name!r}")
    return ATTACKS[name](threat, **options)


def evaluation_attacks(attacks: Attacks, threat: ThreatModel) -> dict[str, Attack]:
    """Attacks by name, checked for evaluation: bounded, made for this threat model, and each name once.

    Args:
        attacks: names, attacks, or a mapping from your own names to either.
        threat: the threat model.

    Raises:
        TypeError: if something is neither a name nor an attack, or ``threat`` is not a threat model.
        ValueError: if an attack is not bounded or was made for another threat model, or a name is unknown or occurs
            twice.
    """
    check_threat(threat, "An evaluation")
    found = resolved("attacks", Attack, attacks, lambda name: get_attack(name, threat), example="pgd")  # type: ignore[type-abstract]
    for key, attack in found.items():
        if not attack.bounded:
            raise ValueError(
                f"{key!r} leaves the threat model's ball, so it is for training only: evaluate with 'pgd' or 'autoattack'."
            )
        if attack.threat != threat:
            raise ValueError(f"{key!r} was made for {attack.threat}, but threat={threat}: use the same threat model.")
    return found

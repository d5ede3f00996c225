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
from lightning_wdefense.attacks.gradient.sinkhorn import SinkhornAttack
from lightning_wdefense.attacks.gradient.soft_ball import SoftBallPGD
from lightning_wdefense.attacks.standard.autoattack import PARTS, AutoAttack, autoattack_part
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.attacks.wasserstein.attack import WassersteinAttack

Attacks = Sequence[str | Attack] | Mapping[str, str | Attack]
"""Several attacks: names, attacks, or a mapping from names of your own to either."""

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "n-fgsm": lambda threat, **options: FGSM(threat, **{"noise": 2.0} | options),
    "pgd": PGD,
    "soft-ball-pgd": SoftBallPGD,
    "lagrangian": LagrangianAttack,
    "feature-scattering": FeatureScattering,
    "gibbs-noise": GibbsNoise,
    "sinkhorn": SinkhornAttack,
    "wasserstein": WassersteinAttack,
    "autoattack": AutoAttack,
    **{part: partial(autoattack_part, part) for part in PARTS},
}
"""Every attack that has a name of ours; each takes the threat model and its own options."""


def get_attack(name: str, threat: ThreatModel, **options: Any) -> Attack:
    """An attack by its name.

    Args:
        name: one of ``ATTACKS``; any other torchattacks attack is ``TorchAttack("Name", threat)``.
        threat: what the attacker may do.
        **options: for the attack's constructor.

    Raises:
        TypeError: if ``threat`` is no threat model.
        ValueError: if the name does not exist, with the nearest ones.

    Example:
        >>> get_attack("pgd", ThreatModel(eps=0.1), steps=20).steps
        20
    """
    if name not in ATTACKS:
        raise ValueError(unknown_name("attack", name, ATTACKS))
    check_threat(threat, f"Attack {name!r}")
    return ATTACKS[name](threat, **options)


def evaluation_attacks(attacks: Attacks, threat: ThreatModel) -> dict[str, Attack]:
    """Attacks by name, fit for measuring: bounded, for this threat model, each name once.

    Raises:
        TypeError: for what is neither a name nor an attack, or no threat model.
        ValueError: for anything else.
    """
    check_threat(threat, "A monitor")
    found = resolved("attacks", Attack, attacks, lambda name: get_attack(name, threat), example="pgd")  # type: ignore[type-abstract]
    for key, attack in found.items():
        if not attack.bounded:
            raise ValueError(
                f"{key!r} leaves the threat model's ball, so it serves training alone: measure with 'pgd' or 'autoattack'."
            )
        if attack.threat != threat:
            raise ValueError(f"{key!r} was made for {attack.threat}, but threat={threat}: use the same one.")
    return found

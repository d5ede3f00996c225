"""Minimum-norm attacks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.gradient.pgd import PGD
from lightning_wdefense.attacks.minimal.base import MinimalAttack
from lightning_wdefense.attacks.minimal.ddn import DDN
from lightning_wdefense.attacks.minimal.fmn import FMN
from lightning_wdefense.attacks.minimal.minimal_eps import MinimalEps
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.attacks.wasserstein.attack import WassersteinAttack

MINIMAL_ATTACKS: dict[str, Callable[..., MinimalAttack]] = {
    "fmn": FMN,
    "ddn": DDN,
    "minimal-pgd": lambda threat, **options: MinimalEps(PGD(threat), **options),
    "minimal-wasserstein": lambda threat, **options: MinimalEps(WassersteinAttack(threat), **options),
}
"""All minimum-norm attacks by name; each is called with the threat model and the attack's own options."""


def get_minimal_attack(name: str, threat: ThreatModel, **options: Any) -> MinimalAttack:
    """Make a minimum-norm attack from its name.

    Args:
        name: one of ``MINIMAL_ATTACKS``. For another bounded attack use ``MinimalEps(attack)``.
        threat: the threat model; its eps is not used, except by ``"minimal-..."``, which begin with it.
        **options: arguments of the attack's constructor.

    Raises:
        TypeError: if ``threat`` is not a threat model.
        ValueError: if the name is unknown, or the attack cannot search in the norm.

    Example:
        >>> get_minimal_attack("fmn", ThreatModel(norm="l2"), steps=50).steps
        50
    """
    if name not in MINIMAL_ATTACKS:
        raise ValueError(unknown_name("minimum-norm attack", name, MINIMAL_ATTACKS))
    check_threat(threat, f"Minimum-norm attack {name!r}")
    return MINIMAL_ATTACKS[name](threat, **options)

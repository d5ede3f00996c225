"""Attacks by name, for configuration files and string arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.autoattack import PARTS, AutoAttack, autoattack_part
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.fgsm import FGSM
from lightning_wdefense.attacks.pgd import PGD
from lightning_wdefense.attacks.threat import ThreatModel

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "n-fgsm": lambda threat, **options: FGSM(threat, **{"noise": 2.0} | options),
    "pgd": PGD,
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
        ValueError: if the name does not exist, with the nearest ones.

    Example:
        >>> get_attack("pgd", ThreatModel(eps=0.1), steps=20).steps
        20
    """
    if name not in ATTACKS:
        raise ValueError(unknown_name("attack", name, ATTACKS))
    return ATTACKS[name](threat, **options)

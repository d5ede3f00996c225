"""Adversarial inputs for any callable model: ``attack(model, inputs, labels) -> adversarial inputs``."""

from lightning_wdefense.attacks.autoattack import AutoAttack
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.execution import Execution
from lightning_wdefense.attacks.fgsm import FGSM
from lightning_wdefense.attacks.pgd import PGD
from lightning_wdefense.attacks.registry import ATTACKS, get_attack
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.attacks.torchattack import TorchAttack
from lightning_wdefense.attacks.worst_case import WorstCase, worst_case

__all__ = [
    "ATTACKS",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Execution",
    "ThreatModel",
    "TorchAttack",
    "WorstCase",
    "get_attack",
    "worst_case",
]

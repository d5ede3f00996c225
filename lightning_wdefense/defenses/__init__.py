"""The training objective: which attack, which discrepancy, which weights."""

from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.defenses.discrepancies import (
    DISCREPANCIES,
    ClassTransport,
    SlicedTransport,
    Transport,
    coral,
    get_discrepancy,
    kl,
    mmd,
    paired_l2,
    weighted_kl,
)
from lightning_wdefense.defenses.recipe import RECIPES, Recipe
from lightning_wdefense.defenses.smoothing import Certificate, WassersteinSmoothing, certified_accuracy_curve

__all__ = [
    "DISCREPANCIES",
    "RECIPES",
    "Certificate",
    "ClassTransport",
    "CriticDiscrepancy",
    "Recipe",
    "SlicedTransport",
    "Transport",
    "WassersteinSmoothing",
    "certified_accuracy_curve",
    "coral",
    "get_discrepancy",
    "kl",
    "mmd",
    "paired_l2",
    "weighted_kl",
]

"""Robust training objectives (recipes and discrepancies), input purifiers, and Wasserstein smoothing."""

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
from lightning_wdefense.defenses.losses.reweighting import SampleReweighting, kl_ball_weights
from lightning_wdefense.defenses.purifier.classifier import PurifiedClassifier
from lightning_wdefense.defenses.purifier.generators import ResidualGenerator
from lightning_wdefense.defenses.purifier.purifier import WassersteinPurifier
from lightning_wdefense.defenses.recipe import RECIPES, Recipe
from lightning_wdefense.defenses.smoothing.smoothing import Certificate, WassersteinSmoothing, certified_accuracy_curve

__all__ = [
    "DISCREPANCIES",
    "RECIPES",
    "Certificate",
    "ClassTransport",
    "CriticDiscrepancy",
    "PurifiedClassifier",
    "Recipe",
    "ResidualGenerator",
    "SampleReweighting",
    "SlicedTransport",
    "Transport",
    "WassersteinPurifier",
    "WassersteinSmoothing",
    "certified_accuracy_curve",
    "coral",
    "get_discrepancy",
    "kl",
    "kl_ball_weights",
    "mmd",
    "paired_l2",
    "weighted_kl",
]

"""Robust training objectives (recipes and discrepancies), input purifiers, and randomised smoothing."""

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
from lightning_wdefense.defenses.smoothing.base import RandomizedSmoothing
from lightning_wdefense.defenses.smoothing.certificate import Certificate, certified_accuracy_curve
from lightning_wdefense.defenses.smoothing.gaussian import GaussianSmoothing
from lightning_wdefense.defenses.smoothing.wasserstein import WassersteinSmoothing

__all__ = [
    "DISCREPANCIES",
    "RECIPES",
    "Certificate",
    "ClassTransport",
    "CriticDiscrepancy",
    "GaussianSmoothing",
    "PurifiedClassifier",
    "RandomizedSmoothing",
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

"""The training objective: which attack, which discrepancy, which weights."""

from lightning_wdefense.defenses.discrepancies import DISCREPANCIES, Transport, get_discrepancy, kl, paired_l2
from lightning_wdefense.defenses.recipe import RECIPES, Recipe

__all__ = ["DISCREPANCIES", "RECIPES", "Recipe", "Transport", "get_discrepancy", "kl", "paired_l2"]

"""Adversarial robustness with optimal transport for PyTorch Lightning."""

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.audit import audit
from lightning_wdefense.callbacks import (
    AdversarialExampleLogger,
    DetectionMonitor,
    RobustnessAudit,
    RobustnessMonitor,
    WassersteinDefense,
)
from lightning_wdefense.defenses import Recipe
from lightning_wdefense.defenses.safe_globals import register_safe_globals
from lightning_wdefense.defenses.step import DefenseOutput
from lightning_wdefense.evaluation import EvaluationResult, evaluate
from lightning_wdefense.mixin import WassersteinDefenseMixin

register_safe_globals()

__version__ = "0.1.0"

__all__ = [
    "AdversarialExampleLogger",
    "DefenseOutput",
    "DetectionMonitor",
    "EvaluationResult",
    "Recipe",
    "RobustnessAudit",
    "RobustnessMonitor",
    "ThreatModel",
    "WassersteinDefense",
    "WassersteinDefenseMixin",
    "audit",
    "evaluate",
]

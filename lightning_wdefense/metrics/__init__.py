"""Robustness metrics with the interface of torchmetrics. They compare predictions, and never run an attack."""

from lightning_wdefense.metrics.accuracy import RobustAccuracy, robust_accuracy
from lightning_wdefense.metrics.curve import (
    AccuracyCurve,
    RobustAccuracyCurve,
    area_under_accuracy_curve,
    robust_accuracy_curve,
)
from lightning_wdefense.metrics.detectability import AUROC, Detectability, detectability
from lightning_wdefense.metrics.distributional import (
    DistributionalAccuracy,
    DistributionalCurve,
    distributional_accuracy,
)
from lightning_wdefense.metrics.sensitivity import Sensitivity, sensitivity
from lightning_wdefense.metrics.shift import TransportShift
from lightning_wdefense.metrics.success import AttackSuccessRate, attack_success_rate

__all__ = [
    "AUROC",
    "AccuracyCurve",
    "AttackSuccessRate",
    "Detectability",
    "DistributionalAccuracy",
    "DistributionalCurve",
    "RobustAccuracy",
    "RobustAccuracyCurve",
    "Sensitivity",
    "TransportShift",
    "area_under_accuracy_curve",
    "attack_success_rate",
    "detectability",
    "distributional_accuracy",
    "robust_accuracy",
    "robust_accuracy_curve",
    "sensitivity",
]

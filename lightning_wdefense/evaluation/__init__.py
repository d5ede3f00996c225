"""Measures a model by attacks: attacked batches, the protocol, the metrics, and `evaluate`, which needs no Trainer."""

from lightning_wdefense.evaluation.evaluate import evaluate
from lightning_wdefense.evaluation.intervals import wilson_interval
from lightning_wdefense.evaluation.result import EvaluationResult

__all__ = ["EvaluationResult", "evaluate", "wilson_interval"]

"""Evaluations that go on where they were interrupted: finished batches in a file, and what tells whether the file is of this evaluation."""

from lightning_wdefense.evaluation.resuming.asked import asked_for
from lightning_wdefense.evaluation.resuming.fingerprint import data_digest
from lightning_wdefense.evaluation.resuming.work import ADVICE, KeptWork, OtherEvaluationError, finished_batches

__all__ = ["ADVICE", "KeptWork", "OtherEvaluationError", "asked_for", "data_digest", "finished_batches"]

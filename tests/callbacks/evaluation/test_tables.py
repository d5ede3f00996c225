"""The tables that W&B and TensorBoard get: the same columns in every run, and the values of the metrics."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from support.lightning_modules import digits_loaders, quiet_trainer, trained_classifier
from support.logs import tensorboard_history, wandb_history

from lightning_wdefense import RobustnessMonitor, ThreatModel, evaluate
from lightning_wdefense.attacks.worst_case import WorstCase
from lightning_wdefense.callbacks.evaluation.tables import BY_CLASS, rows_by_class
from lightning_wdefense.evaluation import wilson_interval
from lightning_wdefense.evaluation.details.classes import ClassCounts

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
EPSILONS = [0.05, 0.1]


def validate(logger) -> None:
    monitor = RobustnessMonitor(THREAT, ["fgsm", "pgd"], epsilons=EPSILONS)
    trainer = quiet_trainer(callbacks=[monitor], logger=logger)
    trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)


def expected() -> dict[str, list[list]]:
    """The tables, from an evaluation without a Trainer."""
    found = evaluate(
        trained_classifier(), digits_loaders()[1], THREAT, ["fgsm", "pgd"], epsilons=EPSILONS, progress=False
    )
    keys = {"clean": "clean_acc", "fgsm": "robust_acc_fgsm", "pgd": "robust_acc_pgd", "worst case": "robust_acc"}
    classes = zip(*(column.tolist() for column in found.by_class()), strict=True)
    shares = zip([0.0, *EPSILONS], found.curve.accuracies.tolist(), strict=True)
    return {
        "attack": [[0, name, found.values[key], *found.intervals[key]] for name, key in keys.items()],
        "class": [[0, label, n, clean, robust, *wilson_interval(robust, n)] for label, n, clean, robust in classes],
        "eps": [[0, eps, share, *wilson_interval(share, 128)] for eps, share in shares],
    }


def test_tables_arrive(tmp_path):
    import wandb

    loggers = [WandbLogger(project="tests", save_dir=tmp_path, offline=True), TensorBoardLogger(tmp_path, name="board")]
    validate(loggers)
    wandb.finish()
    loggers[1].finalize("success")
    history, board = wandb_history(tmp_path), tensorboard_history(loggers[1].log_dir)
    for kind, rows in expected().items():
        key = f"val/robustness_by_{kind}"
        (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{history[key]['path']}")
        table = json.loads(file.read_text())
        assert table["columns"][0] == "epoch"
        assert [row[:2] for row in table["data"]] == [row[:2] for row in rows]
        for row, right in zip(table["data"], rows, strict=True):
            assert row[2:] == pytest.approx(right[2:])
        lines = board[key].splitlines()
        assert lines[0] == f"| {' | '.join(table['columns'])} |"
        assert len(lines) == 2 + len(rows)
        assert lines[2].split(" | ")[1] == str(rows[0][1] if kind != "eps" else 0)


def test_other_loggers_get_none(tmp_path):
    logger = CSVLogger(tmp_path)
    validate(logger)
    logger.finalize("success")
    assert "robustness_by" not in next(tmp_path.rglob("metrics.csv")).read_text()
    validate(False)


def test_pixels_of_masks_have_no_interval():
    labels = torch.tensor([[[0, 1], [1, -100]], [[-100, -100], [-100, -100]]])
    clean = torch.tensor([[[0, 1], [0, 0]], [[0, 0], [0, 0]]])
    counts = ClassCounts()
    counts.update(WorstCase(labels, clean, {"fgsm": torch.zeros_like(labels)}, labels, labels))
    found = counts.compute()
    assert found.samples == 1
    assert rows_by_class(3, found) == [(3, 0, 1, 1.0, 1.0, None, None), (3, 1, 2, 0.5, 0.0, None, None)]
    assert len(BY_CLASS) == 7


def test_counts_of_several_batches_and_processes():
    labels, clean = torch.tensor([0, 2, 2, -100]), torch.tensor([0, 2, 1, 0])
    result = WorstCase(labels, clean, {"fgsm": torch.tensor([1, 2, 1, 0])}, labels, labels)
    counts = ClassCounts()
    for _ in range(3):
        counts.update(result)
    found = counts.compute()
    assert found.samples == 9
    assert [column.tolist() for column in found.accuracies] == [[0, 2], [3, 6], [1.0, 0.5], [0.0, 0.5]]
    both = ClassCounts()
    both.rows = torch.cat([counts.rows[0], torch.tensor([1, 4, 4, 2, 2, 1, 1, 1])])  # as after a reduction
    assert [column.tolist() for column in both.compute().accuracies][:2] == [[0, 1, 2], [3, 4, 7]]

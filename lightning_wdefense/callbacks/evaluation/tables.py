"""Logs tables to the loggers that can show them: as tables to Weights & Biases, as text to TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_wdefense._compat import Trainer, is_a
from lightning_wdefense.callbacks.schedule import logged_step
from lightning_wdefense.evaluation.details.classes import ClassCount
from lightning_wdefense.evaluation.intervals import wilson_interval
from lightning_wdefense.metrics import AccuracyCurve

Row = Sequence[str | int | float | None]

BY_ATTACK = ("epoch", "attack", "accuracy", "low", "high")
"""Columns of the table by attack: accuracy that is left, with the ends of its 95% interval. The columns are the same in every run."""

BY_CLASS = ("epoch", "class", "samples", "clean_acc", "robust_acc", "low", "high")
"""Columns of the table by class; the interval is that of the robust accuracy. Of masks it counts pixels."""

BY_EPS = ("epoch", "eps", "accuracy", "low", "high")
"""Columns of the accuracy curve as a table."""


def shows_tables(trainer: Trainer) -> bool:
    """Whether a logger of this trainer can show tables."""
    return trainer.is_global_zero and any(
        is_a(it, "WandbLogger") or is_a(it, "TensorBoardLogger") for it in trainer.loggers
    )


def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Log a table under ``key``, at the step at which Lightning logs metrics now. Other loggers are skipped."""
    if not trainer.is_global_zero:
        return
    step = logged_step(trainer)
    for logger in trainer.loggers:
        if is_a(logger, "WandbLogger"):
            logger.log_table(key, list(columns), [list(row) for row in rows], step=step)  # type: ignore[attr-defined]
        elif is_a(logger, "TensorBoardLogger"):
            logger.experiment.add_text(key, _markdown(columns, rows), step)  # type: ignore[attr-defined]


def rows_by_attack(epoch: int, values: dict[str, float], attacks: Sequence[str], count: int) -> list[Row]:
    """A row for clean inputs, for each attack, and for the worst case of all attacks.

    Args:
        epoch: the epoch.
        values: accuracies by the names under which they are logged.
        attacks: names of the attacks.
        count: number of samples.
    """
    keys = (
        {"clean_acc": "clean"} | {f"robust_acc_{attack}": attack for attack in attacks} | {"robust_acc": "worst case"}
    )
    return [(epoch, name, *_with_interval(values[key], count)) for key, name in keys.items()]


def rows_by_class(epoch: int, found: ClassCount) -> list[Row]:
    """A row for each class. Pixels of masks depend on each other, so their shares have no interval."""
    columns = found.accuracies
    masks = int(columns.counts.sum()) > found.samples
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        (epoch, label, count, clean, *_with_interval(robust, 0 if masks else count))
        for label, count, clean, robust in rows
    ]


def rows_by_eps(epoch: int, curve: AccuracyCurve, count: int) -> list[Row]:
    """A row for each eps, rounded to the digits that float32 has, so that it is the same in every run."""
    pairs = zip(curve.epsilons.tolist(), curve.accuracies.tolist(), strict=True)
    return [(epoch, float(f"{eps:.6g}"), *_with_interval(accuracy, count)) for eps, accuracy in pairs]


def _with_interval(share: float, count: int) -> list[float | None]:
    """A share and its interval; what is NaN is left empty, because a table of W&B has one type for each column."""
    return [None if math.isnan(value) else value for value in (share, *wilson_interval(share, count))]


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

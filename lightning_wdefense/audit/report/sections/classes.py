"""Accuracies by class, confusion under attack, and the transport plan between classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_wdefense.audit.report.pages.charts.bars import interval, percent
from lightning_wdefense.audit.report.pages.charts.heat_map import heat_map
from lightning_wdefense.audit.report.pages.page import Block, Section, Table, Text
from lightning_wdefense.evaluation.intervals import wilson_interval
from lightning_wdefense.evaluation.result import EvaluationResult

SHOWN = 20
"""Number of classes that fit on a page. Of more, the least robust ones are shown."""

LONGEST_NAME = 11
"""Number of characters of a name of a class that a chart has room for."""


def class_section(result: EvaluationResult, names: Sequence[str]) -> Section | None:
    """What happens to each class, for samples with one label each.

    Args:
        result: what was measured.
        names: names of the classes; those without a name are called by their number.
    """
    if "label" not in result.samples:
        return Section(
            "Classes", (Text("The samples are masks, with several labels each, so they are not counted by class."),)
        )
    by_class = result.by_class()
    if not len(by_class.classes):
        return None
    order = by_class.robust.argsort(stable=True)[:SHOWN]
    shown = by_class.classes[order].sort().values
    few = len(shown) < len(by_class.classes)
    # Names that are too long for the charts would be cut off, so the charts have numbers, which the table explains.
    long = any(len(named(label, names)) > LONGEST_NAME for label in shown.tolist())
    rows = []
    for label, count, clean, robust in zip(*(column.tolist() for column in by_class), strict=True):
        if label in shown:
            ends = interval(*wilson_interval(robust, count))
            name = f"{label}: {named(label, names)}" if long else named(label, names)
            rows.append((name, f"{count}", percent(clean), percent(robust), ends))
    blocks: list[Block] = [Table(("Class", "Samples", "Clean", "Robust", "95% interval"), rows)]
    if few:
        blocks.append(
            Text(
                f"The {len(shown)} least robust of {len(by_class.classes)} classes; report.json has them all.",
                note=True,
            )
        )
    words = [str(label) if long else named(label, names) for label in shown.tolist()]
    confusion = result.confusion()
    if confusion.any():
        blocks.append(
            heat_map(
                "Confusion under attack",
                _shares(confusion, shown),
                words,
                "label",
                "prediction",
                "Percent of each label's samples by their first wrong prediction, or by the label where no attack found one.",
            )
        )
    if result.plan is not None and len(result.plan) > int(shown.max()):
        blocks.append(
            heat_map(
                "Transport between classes",
                _shares(result.plan, shown),
                words,
                "clean",
                "attacked",
                "Where entropic optimal transport moves the clean features of each class (percent of its mass) to match the attacked ones, by "
                "their labels. What lies beside the diagonal shows which classes the attack makes overlap.",
            )
        )
    return Section("Classes", tuple(blocks))


def named(label: int, names: Sequence[str]) -> str:
    """The name of a class; of no class, for outputs that are not finite."""
    return "no class" if label < 0 else str(names[label]) if label < len(names) else str(label)


def _shares(matrix: Tensor, shown: Tensor) -> Tensor:
    """The shown rows and columns of a matrix ``(K, K)``, as shares of its whole rows."""
    matrix = matrix.double()
    sums = matrix.sum(1, keepdim=True)
    return torch.where(sums > 0, matrix / sums, 0.0)[shown][:, shown]

"""What a comparison of several models holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_wdefense.audit.findings import AuditReport
from lightning_wdefense.audit.report.pages.charts.bars import Bar, bars, interval, percent
from lightning_wdefense.audit.report.pages.charts.drawing import COLOURS
from lightning_wdefense.audit.report.pages.page import Block, Cell, Chart, Page, Section, Table, Text
from lightning_wdefense.audit.report.sections.accuracy import accuracy_curve
from lightning_wdefense.audit.report.sections.checks import mark_of
from lightning_wdefense.audit.report.words import duration, eps_in_words, listed, points, threat_in_words
from lightning_wdefense.evaluation.result import CLEAN, ROBUST, EvaluationResult

Model = tuple[str, EvaluationResult, AuditReport | None, Mapping[str, float]]
"""Name, result, audit and training cost of a model."""

LONGEST_TITLE = 60
"""Number of characters up to which the names of all models are the title."""


def comparison_page(models: Sequence[Model], differences: Sequence[Any]) -> Page:
    """The page of a comparison.

    Args:
        models: the models.
        differences: the :class:`~lightning_wdefense.audit.report.comparison.Difference` of each pair.
    """
    first = models[0][1]
    threat, count = first.threat, len(first.samples["broken_by"])
    blocks: list[Block] = [_accuracies(models), _bars(models)]
    if any(result.curve is not None for _, result, _, _ in models):
        blocks.append(accuracy_curve([(name, result) for name, result, _, _ in models], threat))
    sections = [
        Section(
            "Threat model",
            (Text(threat_in_words(threat)), Text(f"Attacks: {listed(first.attacks)}, on the same {count} samples.")),
        ),
        Section("Accuracy", tuple(blocks)),
        Section("Paired differences", (*_differences(differences), Text(_method(differences), note=True))),
        Section("By attack", (_by_attack(models),)),
    ]
    costs = _costs(models)
    if costs is not None:
        sections.append(Section("Costs", (costs,)))
    lead = f"Comparison of {len(models)} models: {threat.norm}, eps {eps_in_words(threat)}, {count} samples"
    opening = Text(
        "Robust accuracies are upper bounds under these attacks: a stronger attack may leave less, and change the order. The differences say how "
        "well these samples tell the models apart, and nothing of other seeds of their training."
    )
    openings = [opening]
    failed = [name for name, _, audit, _ in models if audit is not None and audit.failed]
    if failed:
        openings.append(
            Text(f"The audit failed {listed(failed)}: do not believe these accuracies before what failed is mended.")
        )
    title = listed([name for name, *_ in models])
    if len(title) > LONGEST_TITLE:
        title = f"{len(models)} models"
    return Page(title, None, lead, tuple(openings), tuple(sections))


def _accuracies(models: Sequence[Model]) -> Table:
    audited = any(audit is not None for _, _, audit, _ in models)
    optional = {"auac": "AUAC", "distributional_acc": "Distributional", "median_distance": "Median distance"}
    shown = {key: name for key, name in optional.items() if any(key in result.values for _, result, _, _ in models)}
    rows: list[tuple[Cell, ...]] = []
    for name, result, audit, _ in models:
        row: list[Cell] = [name]
        for key in (ROBUST, CLEAN):
            row += [percent(result.values[key]), interval(*result.intervals[key])]
        for key in shown:
            value = result.values.get(key, math.nan)
            row.append(
                percent(value) if key != "median_distance" else "unknown" if math.isnan(value) else f"{value:.3g}"
            )
        if audited:
            row.append("not audited" if audit is None else mark_of(audit.verdict))
        rows.append(tuple(row))
    head = (
        "Model",
        "Robust",
        "95% interval",
        "Clean",
        "95% interval",
        *shown.values(),
        *(["Audit"] if audited else []),
    )
    return Table(head, rows)


def _bars(models: Sequence[Model]) -> Chart:
    rows = [
        Bar(name, result.robust_acc, *result.intervals[ROBUST], index % COLOURS)
        for index, (name, result, *_) in enumerate(models)
    ]
    return bars("Robust accuracy", rows, "Lines are Wilson 95% intervals.")


def _differences(differences: Sequence[Any]) -> list[Block]:
    blocks: list[Block] = []
    for title, kind in (("Robust accuracy", "robust"), ("Clean accuracy", "clean")):
        rows = []
        for each in differences:
            found = getattr(each, kind)
            p_value = (
                "–" if math.isnan(found.p_value) else "< 0.0001" if found.p_value < 1e-4 else f"{found.p_value:.4f}"
            )
            ends = "–" if math.isnan(found.low) else f"{points(found.low)} to {points(found.high)}"
            row = (f"{each.first} − {each.second}", points(found.difference), ends)
            rows.append((*row, p_value, f"{found.only_first}", f"{found.only_second}"))
        blocks.append(Table((title, "Points", "95% interval", "p", "Only 1st right", "Only 2nd right"), rows))
    return blocks


def _method(differences: Sequence[Any]) -> str:
    shares = any(math.isnan(each.robust.p_value) for each in differences)
    method = (
        "Intervals are normal intervals of the mean difference of each sample's share of right labels."
        if shares
        else "Intervals are Newcombe's score intervals for paired proportions, p that of McNemar's exact test."
    )
    return f"First minus second in percentage points, sample by sample. {method} Each stands by itself: of many pairs some differ by chance."


def _by_attack(models: Sequence[Model]) -> Table:
    attacks = models[0][1].attacks
    keys = {CLEAN: "Clean"} | {f"{ROBUST}_{attack}": f"After {attack}" for attack in attacks} | {ROBUST: "Worst case"}
    rows = [(name, *(percent(result.values.get(key, math.nan)) for key in keys)) for name, result, _, _ in models]
    return Table(("Model", *keys.values()), rows)


def _costs(models: Sequence[Model]) -> Table | None:
    names = tuple(dict.fromkeys(key for _, _, _, cost in models for key in cost))
    timed = any(result.seconds for _, result, _, _ in models)
    rows = []
    for model, result, _, cost in models:
        row = [f"{cost[name]:.4g}" if name in cost else "–" for name in names]
        if timed:
            row.append(duration(result.seconds["total"]) if result.seconds else "–")
        rows.append((model, *row))
    head = ("Model", *names, *(["evaluation"] if timed else []))
    return Table(head, rows) if len(head) > 1 else None

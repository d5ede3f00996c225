"""Several models beside each other, with differences on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_wdefense.audit.report.pages.html import html
from lightning_wdefense.audit.report.pages.markdown import markdown
from lightning_wdefense.audit.report.paired import PairedDifference, paired_difference
from lightning_wdefense.audit.report.report import FORMAT, Report
from lightning_wdefense.audit.report.sections.versus import comparison_page
from lightning_wdefense.audit.report.storage import plain, result_to_dict, to_json, write_files

SAME = ("norm", "eps", "bounds")
"""What the threat models must have in common. mean and std belong to each model's own pipeline."""

SUMMARY = ("threat", "attacks", "values", "intervals", "curve", "seconds")
"""Entries of a report that a comparison repeats."""


class Difference(NamedTuple):
    """How two of the models differ, first minus second.

    Attributes:
        first: name of the first model.
        second: name of the second model.
        clean: difference of the clean accuracies.
        robust: difference of the robust accuracies.
    """

    first: str
    second: str
    clean: PairedDifference
    robust: PairedDifference


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Several models, measured on the same samples under the same threat; made by :func:`compare`. Printed, it is a short table.

    Attributes:
        reports: the reports of the models.
        differences: the differences of each pair of them, in order.
    """

    reports: tuple[Report, ...]
    differences: tuple[Difference, ...]

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.html``, ``comparison.md`` and ``comparison.json`` into a folder, and return their paths."""
        named = [(report.name, report.result, report.audit, report.cost) for report in self.reports]
        page = comparison_page(named, self.differences)
        texts = {
            "comparison.html": html(page),
            "comparison.md": markdown(page),
            "comparison.json": to_json(self.to_dict()),
        }
        return write_files(folder, texts)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values, for JSON, without the samples, which are in the reports."""
        models = []
        for report in self.reports:
            values = result_to_dict(report.result)
            audit = None if report.audit is None else report.audit.to_dict()
            models.append(
                {"name": report.name, "cost": report.cost, "audit": audit} | {name: values[name] for name in SUMMARY}
            )
        differences = [
            {"first": each.first, "second": each.second, "clean": each.clean._asdict(), "robust": each.robust._asdict()}
            for each in self.differences
        ]
        return {"format": FORMAT, "models": plain(models), "differences": plain(differences)}

    def __repr__(self) -> str:
        """The accuracies of each model, and the differences of each pair in points with their 95% intervals, as a table, with verdicts of the audits."""
        pairs = [f"{each.first} - {each.second}" for each in self.differences]
        width = max(map(len, (*pairs, *(report.name for report in self.reports))))
        audited = any(report.audit is not None for report in self.reports)
        rows = [f"{'':{width}}  {'clean':22}  {'robust':22}  {'audit' if audited else ''}"]
        for report in self.reports:
            clean, robust = (
                f"{100 * report.result.values[name]:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
                for name, (low, high) in report.result.intervals.items()
                if name in ("clean_acc", "robust_acc")
            )
            verdict = report.audit.verdict if report.audit else "not audited" if audited else ""
            rows.append(f"{report.name:{width}}  {clean:22}  {robust:22}  {verdict}")
        for pair, each in zip(pairs, self.differences, strict=True):
            clean, robust = (
                f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
                for found in (each.clean, each.robust)
            )
            rows.append(f"{pair:{width}}  {clean:22}  {robust}")
        return "\n".join(row.rstrip() for row in rows)


def compare(reports: Sequence[Report]) -> Comparison:
    """Compare models on the samples that all of them were measured on.

    Differences are paired: sample by sample. So they have shorter intervals than the accuracies themselves, see
    :func:`~lightning_wdefense.audit.report.paired.paired_difference`. Each interval is a 95% interval by itself: of many
    pairs, some will differ by chance.

    Args:
        reports: two reports or more, with different names.

    Raises:
        ValueError: if there are fewer than two reports, or two have the same name; if they were measured under other threats or other
            attacks, or on other samples, which is told from the number and the labels of the samples.

    Example:
        >>> import torch
        >>> from lightning_wdefense import ThreatModel, evaluate
        >>> loader = [(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 1]))]
        >>> models = {"same": torch.nn.Identity(), "twice": torch.nn.Linear(2, 2, bias=False)}
        >>> _ = models["twice"].weight.data.copy_(2 * torch.eye(2))
        >>> threat = ThreatModel(eps=0.2)
        >>> reports = [Report(name, evaluate(model, loader, threat, features=None)) for name, model in models.items()]
        >>> compare(reports).differences[0].robust.difference
        0.0
    """
    if len(reports) < 2:
        raise ValueError(f"compare needs two reports or more, got {len(reports)}.")
    names = [report.name for report in reports]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two reports are called {name!r}: give each model a name of its own.")
    for report in reports[1:]:
        _check_same(reports[0], report)
    return Comparison(tuple(reports), tuple(_difference(*pair) for pair in combinations(reports, 2)))


def _difference(first: Report, second: Report) -> Difference:
    before, after = first.result.samples, second.result.samples
    clean, robust = (paired_difference(before[name], after[name]) for name in ("clean_right", "robust_right"))
    return Difference(first.name, second.name, clean, robust)


def _check_same(first: Report, second: Report) -> None:
    pair = f"{first.name!r} and {second.name!r}"
    one, other = first.result, second.result
    for name in SAME:
        values = getattr(one.threat, name), getattr(other.threat, name)
        if values[0] != values[1]:
            raise ValueError(
                f"{pair} were measured under different threats ({name} {values[0]} and {values[1]}), so their accuracies cannot be compared: "
                "evaluate both under the same threat model."
            )
    if one.attacks != other.attacks:
        raise ValueError(
            f"{pair} were measured by different attacks ({', '.join(one.attacks)}, and {', '.join(other.attacks)}): evaluate both by the same "
            "attacks, in the same order."
        )
    counts = len(one.samples["broken_by"]), len(other.samples["broken_by"])
    if counts[0] != counts[1]:
        raise ValueError(
            f"{pair} were measured on different data, {counts[0]} and {counts[1]} samples: evaluate both on the same loader."
        )
    for name in ("label", "pixels", "rank"):
        columns = one.samples.get(name), other.samples.get(name)
        if (columns[0] is None) != (columns[1] is None) or (columns[0] is not None and not torch.equal(*columns)):  # type: ignore[arg-type]
            what = {"label": "The labels", "pixels": "The sizes of the masks", "rank": "The processes"}[name]
            raise ValueError(
                f"{pair} were measured on different data. {what} of their samples differ: evaluate both on the same loader, without shuffling."
            )

"""What the audit found."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_wdefense.audit.findings import AuditReport, Verdict
from lightning_wdefense.audit.report.pages.charts.bars import percent
from lightning_wdefense.audit.report.pages.page import Block, Mark, Remark, Section, Table, Text, Tone
from lightning_wdefense.audit.report.words import duration, listed

TONES: dict[Verdict, Tone] = {"pass": "good", "warn": "fair", "fail": "bad", "skipped": "plain"}

OPEN = ("fail", "warn")
"""Verdicts that ask for something to be done, in the order in which they are shown."""


def mark_of(verdict: Verdict) -> Mark:
    """The word of a verdict in its colour."""
    return Mark(verdict, TONES[verdict])


def audit_section(audit: AuditReport | None) -> Section:
    """Whether the figure can be believed."""
    if audit is None:
        text = "This claim was not audited. An audit looks for the faults by which most published defences fell, such as masked gradients."
        return Section("Audit", (Text(text),))
    claim = (
        f"Claimed on {audit.samples} samples: {percent(audit.robust_acc)} under {listed(audit.attacks)}. Left after everything that the audit "
        f"tried: {percent(audit.audited_acc)}."
    )
    blocks: list[Block] = [Text(f"{claim} {_conclusion(audit)}")]
    for verdict in OPEN:
        for found in audit.findings:
            if found.verdict == verdict:
                blocks.append(
                    Remark(
                        mark_of(verdict),
                        found.check,
                        _sentence(found.figure, audit.attacks),
                        found.meaning,
                        found.advice,
                    )
                )
    rest = [found for found in audit.findings if found.verdict not in OPEN]
    if rest:
        rows = [
            (found.check, mark_of(found.verdict), f"{_sentence(found.figure, audit.attacks)} {found.meaning}")
            for found in rest
        ]
        blocks.append(Table(("Check", "Verdict", "What was found"), rows, numbers=False))
    blocks.append(Text(f"The audit took {duration(audit.seconds)}.", note=True))
    return Section("Audit", tuple(blocks))


def _sentence(figure: str, attacks: Sequence[str]) -> str:
    """A figure as a sentence; names of attacks keep their letters."""
    first = figure[:1] if figure.startswith(tuple(attacks)) else figure[:1].upper()
    return f"{first}{figure[1:].rstrip('.')}."


def _conclusion(audit: AuditReport) -> str:
    if audit.failed:
        return "Do not believe the claim before what failed is mended."
    if audit.verdict == "warn":
        return "No check failed, but some ask for a look."
    return "No check failed. That is no proof: it says that the usual faults were looked for and not found."

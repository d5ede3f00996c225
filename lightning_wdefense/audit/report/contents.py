"""What a report of one model holds, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_wdefense.audit.findings import AuditReport
from lightning_wdefense.audit.report.pages.charts.bars import percent
from lightning_wdefense.audit.report.pages.page import Figures, Page
from lightning_wdefense.audit.report.sections.accuracy import accuracy_section, distance_section, headline, meaning
from lightning_wdefense.audit.report.sections.checks import audit_section, mark_of
from lightning_wdefense.audit.report.sections.classes import class_section
from lightning_wdefense.audit.report.sections.examples import example_section
from lightning_wdefense.audit.report.sections.origin import CLASS_NAMES, origin_section, threat_section
from lightning_wdefense.audit.report.words import eps_in_words
from lightning_wdefense.evaluation.result import EvaluationResult


def page_of(
    name: str,
    result: EvaluationResult,
    audit: AuditReport | None,
    cost: Mapping[str, float],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Page:
    """The page of a report."""
    names = settings.get(CLASS_NAMES) or ()
    figures = headline(result)
    if audit is not None:
        audited = (
            "After the audit",
            percent(audit.audited_acc),
            f"{audit.samples} samples; claimed {percent(audit.robust_acc)}",
        )
        figures = Figures((*figures.items[:2], audited, *figures.items[2:]))
    sections = (
        threat_section(result),
        accuracy_section(result),
        audit_section(audit),
        distance_section(result),
        class_section(result, names),
        example_section(result, names),
        origin_section(result, audit, cost, settings, environment),
    )
    threat = result.threat
    lead = f"Robustness report: {threat.norm}, eps {eps_in_words(threat)}, {len(result.samples['broken_by'])} samples, {environment.get('date', '')}"
    return Page(
        name,
        None if audit is None else mark_of(audit.verdict),
        lead.removesuffix(", "),
        (figures, *meaning(result)),
        tuple(section for section in sections if section is not None),
    )

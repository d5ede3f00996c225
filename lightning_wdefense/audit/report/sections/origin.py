"""Where the figures come from: threat model, data, costs, settings, versions and hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_wdefense.audit.findings import AuditReport
from lightning_wdefense.audit.report.pages.page import Block, Section, Table, Text
from lightning_wdefense.audit.report.words import duration, flattened, listed, threat_in_words
from lightning_wdefense.evaluation.result import EvaluationResult

CLASS_NAMES = "class_names"
"""The setting that holds the names of the classes."""


def threat_section(result: EvaluationResult) -> Section:
    """What the attacker may do, and which attacks stood for it."""
    kind = "images with a mask each" if "pixels" in result.samples else "samples"
    text = f"Attacks: {listed(result.attacks)}, on {len(result.samples['broken_by'])} {kind}."
    return Section("Threat model", (Text(threat_in_words(result.threat)), Text(text)))


def origin_section(
    result: EvaluationResult,
    audit: AuditReport | None,
    cost: Mapping[str, float],
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Section:
    """Costs, settings and versions: what somebody needs who repeats it."""
    costs = [(name, f"{value:.4g}") for name, value in cost.items()]
    if result.seconds:
        costs.append(("evaluation", duration(result.seconds["total"])))
        costs.append(("of that, attacks", duration(result.seconds["attacks"])))
    if audit is not None:
        costs.append(("audit", duration(audit.seconds)))
    shown = flattened({name: value for name, value in settings.items() if name != CLASS_NAMES})
    blocks: list[Block] = []
    for head, rows in (("Cost", costs), ("Setting", shown), ("Environment", list(environment.items()))):
        if rows:
            blocks.append(Table((head, ""), rows, numbers=False))
    if not settings:
        blocks.append(
            Text(
                "No settings were given: name the seed, the data and the checkpoint for those who repeat this.",
                note=True,
            )
        )
    return Section("How to repeat it", tuple(blocks))

"""The commands with the real audit and reports: from a checkpoint to the pages and back."""

from __future__ import annotations

import json

import pytest
from cli.conftest import DATA, MODEL

from lightning_wdefense.audit import AuditReport

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_reports():
    """Reports are written here."""


def test_evaluate_audit_and_compare(command, evaluated, checkpoints, folder):
    done = evaluated(
        "--audit",
        "--samples",
        20,
        "--attacks",
        "apgd-ce",
        "apgd-t",
        "--examples",
        2,
        "--output",
        "one",
        "--max-batches",
        2,
    )
    assert done.status == 0, done.err
    assert "Audit on 20 samples" in done.out
    assert done.out.endswith("Wrote one/report.html, one/report.md, one/report.json\n")
    written = json.loads((folder / "one" / "report.json").read_text())
    audited = AuditReport.from_dict(written["audit"])
    assert audited.samples == 20
    assert audited.verdict in done.out
    model = ("--model", MODEL, "--checkpoint", checkpoints / "digits.ckpt", "--data", DATA, "--threat.eps", 0.1)
    done = command(
        "audit", *model, "--samples", 64, "--output", "two", "--name", "two", "--attacks", "apgd-ce", "apgd-t"
    )
    assert done.status == 0, done.err
    done = command("compare", "one", "two", "--output", "both")
    assert done.status == 0, done.err
    assert "DigitsClassifier - two" in done.out
    assert "Comparison(" not in done.out
    assert (folder / "both" / "comparison.html").is_file()

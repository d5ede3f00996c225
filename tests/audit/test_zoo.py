"""The audit fails every broken defence by a check that names its fault, and no honest one."""

from __future__ import annotations

import pytest
from audit.zoo.exhibits import BROKEN, HONEST

QUICK = {
    "quantised inputs",
    "temperature",
    "probabilities",
    "left in training mode",
    "a backward of its own",
    "linear",
    "pgd-at",
}
"""The others take as long and are alike."""


@pytest.mark.parametrize(
    "exhibit",
    [
        pytest.param(each, marks=[] if each.name in QUICK else pytest.mark.slow, id=each.name)
        for each in BROKEN + HONEST
    ],
)
@pytest.mark.filterwarnings("ignore:The model is not run on parts")
def test_the_audit_tells_it_apart(exhibit):
    report = exhibit.audit(samples=100 if exhibit.broken else 60)
    assert exhibit.told_apart(report), report
    assert report.audited_acc <= report.robust_acc <= report.clean_acc
    if exhibit.name == "quantised inputs":
        assert report.audited_acc < report.robust_acc - 0.3
    for finding in report.findings:
        assert 0 < len(finding.figure) <= 100, "it stands in one line of a terminal"
        assert finding.meaning
        assert bool(finding.advice) or finding.verdict not in ("warn", "fail")


def test_the_zoo_is_what_was_asked_for():
    assert len(BROKEN) >= 10
    assert len(HONEST) >= 6

"""Several models beside each other."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from audit.report.conftest import AUDIT, CASES, EVIL, measured, of_masks
from audit.report.test_html import Checked

from lightning_wdefense import EvaluationResult, ThreatModel
from lightning_wdefense.audit import Report, compare
from lightning_wdefense.audit.report.paired import paired_difference

pytestmark = pytest.mark.filterwarnings("ignore")


def changed(result: EvaluationResult, **columns) -> EvaluationResult:
    return dataclasses.replace(result, samples=result.samples | columns, values=dict(result.values))


def other(full: bool = True) -> Report:
    result = changed(measured(full), robust_right=measured(full).samples["robust_right"].roll(3))
    result.values["robust_acc"] = 0.125
    return Report("other " + EVIL, result, cost={"training (s)": 3.0})


@pytest.fixture(scope="module")
def three():
    return compare([Report("one", measured(True), AUDIT), other(), Report("three", measured(True))])


def test_differences_of_all_pairs(three):
    assert [(each.first, each.second) for each in three.differences] == [
        ("one", "other " + EVIL),
        ("one", "three"),
        ("other " + EVIL, "three"),
    ]
    one = measured(True).samples["robust_right"]
    assert three.differences[0].robust == paired_difference(one, one.roll(3))
    assert three.differences[1].robust.difference == 0
    assert three.differences[0].clean.difference == 0


def test_it_prints_as_a_table(three):
    head, *rows = str(three).splitlines()
    assert head.split() == ["clean", "robust", "audit"]
    assert [row.split("  ")[0].strip() for row in rows] == [
        *("one", "other " + EVIL, "three"),
        *(f"{each.first} - {each.second}" for each in three.differences),
    ]
    assert rows[0].endswith(AUDIT.verdict)
    assert re.search(r"12\.5% \([\d.]+ to [\d.]+\)  +not audited$", rows[1])
    assert re.search(r"\+0\.0 \(-[\d.]+ to \+[\d.]+\)  \s*\+0\.0 \(-[\d.]+ to \+[\d.]+\)$", rows[4])


def test_files(three, tmp_path):
    paths = three.write(tmp_path)
    assert [path.name for path in paths] == ["comparison.html", "comparison.md", "comparison.json"]
    page = Checked(paths[0].read_text())
    assert "".join(page.text).count(EVIL) > 5
    assert "script" not in page.tags
    values = json.loads(paths[2].read_text())
    assert values["differences"][0]["robust"] == three.differences[0].robust._asdict()
    assert [model["name"] for model in values["models"]] == [report.name for report in three.reports]
    assert "samples" not in values["models"][0]


def test_table(three, tmp_path):
    text = three.write(tmp_path)[1].read_text()
    head = next(line for line in text.splitlines() if line.startswith("| Model"))
    assert (
        head
        == "| Model | Robust | 95% interval | Clean | 95% interval | AUAC | Distributional | Median distance | Audit |"
    )
    result = measured(True)
    row = next(line for line in text.splitlines() if line.startswith("| one |")).split(" | ")
    assert (row[1], row[3]) == (f"{result.robust_acc:.1%}", f"{result.clean_acc:.1%}")
    assert row[-1] == "fail |"
    assert "not audited" in text
    assert "The audit failed one: do not believe these accuracies before what failed is mended." in text
    assert any("one − three" in line and "+0.0" in line for line in text.splitlines())
    assert re.search(r"Newcombe.*McNemar", text)
    share = f"{result.values['robust_acc_fgsm']:.1%}"
    assert "| Model | Clean | After fgsm | After pgd | Worst case |" in text
    assert f"| one | {result.clean_acc:.1%} | {share} | {result.robust_acc:.1%} | {result.robust_acc:.1%} |" in text
    assert "| Model | training (s) | evaluation |" in text


def test_many_models_have_a_short_title(tmp_path):
    reports = [Report(f"a model with a rather long name, number {index}", measured(False)) for index in range(4)]
    text = compare(reports).write(tmp_path)[1].read_text()
    assert text.startswith("# 4 models\n")
    assert sum("− a model" in line for line in text.splitlines()) == 2 * 6


def test_read_back_from_files(tmp_path):
    for report in (Report("one", measured(False)), other(False)):
        report.write(tmp_path / report.name[:3])
    again = compare([Report.load(tmp_path / name) for name in ("one", "oth")])
    before = compare([Report("one", measured(False)), other(False)])
    assert again.differences[0].robust == before.differences[0].robust


def test_masks(tmp_path):
    results = [of_masks(), changed(of_masks(), robust_right=of_masks().samples["robust_right"] / 2)]
    found = compare([Report(name, result) for name, result in zip("ab", results, strict=True)])
    assert found.differences[0].robust.difference == pytest.approx(
        float((results[0].samples["robust_right"] / 2).nanmean())
    )
    assert "normal intervals" in found.write(tmp_path)[1].read_text()


def test_another_pipeline_may_normalise_otherwise():
    threat = dataclasses.replace(measured(False).threat, mean=0.5, std=0.5)
    compare([Report("one", measured(False)), Report("two", dataclasses.replace(measured(False), threat=threat))])


def test_what_cannot_be_compared():
    result, one = measured(False), Report("one", measured(False))
    few = dataclasses.replace(result, samples={name: column[:5] for name, column in result.samples.items()})
    labels = changed(result, label=result.samples["label"].flip(0))
    for reports, message in [
        ([one], "two reports or more, got 1"),
        ([one, one], "Two reports are called 'one'"),
        (
            [one, Report("b", dataclasses.replace(result, threat=ThreatModel(eps=0.2)))],
            r"different threats \(eps 0.1 and 0.2\)",
        ),
        ([one, Report("b", dataclasses.replace(result, attacks=("fgsm",)))], "different attacks .fgsm, pgd, and fgsm."),
        ([one, Report("b", few)], "different data, 128 and 5 samples"),
        ([one, Report("b", labels)], "The labels of their samples differ.*without shuffling"),
        ([Report("masks", of_masks()), CASES["masks"]()], "Two reports are called"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(reports)


def test_labels_and_masks_are_no_same_data():
    masks = of_masks()
    labelled = dataclasses.replace(
        measured(False),
        samples={name: column[:6] for name, column in measured(False).samples.items()},
        attacks=masks.attacks,
    )
    assert torch.equal(labelled.samples["label"], measured(False).samples["label"][:6])
    with pytest.raises(ValueError, match="different data"):
        compare([Report("masks", masks), Report("labels", labelled)])

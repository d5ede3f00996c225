"""What a report says is what was measured, and it can be read back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from audit.report.conftest import AUDIT, CASES, THREAT, measured

from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks.threat import Norm
from lightning_wdefense.audit import Report
from lightning_wdefense.audit.report import storage
from lightning_wdefense.audit.report.words import duration, eps_in_words, threat_in_words
from lightning_wdefense.evaluation import wilson_interval

pytestmark = pytest.mark.filterwarnings("ignore")


def markdown(report: Report, folder: Path) -> str:
    return report.write(folder)[1].read_text()


def test_three_files_of_a_folder_that_is_made(report, tmp_path):
    paths = report.write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(path.name for path in paths)


def test_round_trip(report, tmp_path):
    html, page, file = report.write(tmp_path / "first")
    again = Report.load(file)
    for name, path in zip(("html", "md", "json"), again.write(tmp_path / "again"), strict=True):
        assert path.read_text() == {"html": html, "md": page, "json": file}[name].read_text(), name
    first, second = report.result, again.result
    assert str(first) == str(second)
    assert first.threat == second.threat
    for name, column in first.samples.items():
        assert torch.equal(second.samples[name].nan_to_num(-7), column.nan_to_num(-7)), name
        assert second.samples[name].dtype == column.dtype
    assert (first.curve is None) == (second.curve is None)
    assert first.curve is None or all(map(torch.equal, first.curve, second.curve))
    assert (first.plan is None) == (second.plan is None)
    assert first.plan is None or torch.equal(first.plan, second.plan)
    for one, other in zip(*(sum(each.examples or ((), ()), ()) for each in (first, second)), strict=True):
        assert torch.equal(one.pair, other.pair)
        assert str(one[:5]) == str(other[:5])
    assert (report.audit is None) == (again.audit is None)
    assert str(report.audit) == str(again.audit)
    assert Report.load(tmp_path / "first").name == report.name  # the folder will do


def test_json_is_strict(report, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads(report.write(tmp_path)[2].read_text(), parse_constant=refuse)
    assert values["values"]["robust_acc"] == report.result.robust_acc
    assert values["intervals"]["robust_acc"] == list(report.result.intervals["robust_acc"])
    assert len(values["samples"]["robust_right"]) == len(report.result.samples["robust_right"])
    assert {"torch", "python", "date", "processor"} <= values["environment"].keys()


def test_values_of_the_page_are_those_of_the_result(tmp_path):
    report = CASES["full"]()
    text, result = markdown(report, tmp_path), report.result
    for name, key in (("Clean accuracy", "clean_acc"), ("Robust accuracy", "robust_acc")):
        low, high = result.intervals[key]
        assert f"**{name}**: {result.values[key]:.1%} (95% interval {100 * low:.1f} to {100 * high:.1f}%)" in text
    for attack in ("fgsm", "pgd"):
        low, high = result.intervals[f"robust_acc_{attack}"]
        share = result.values[f"robust_acc_{attack}"]
        assert f"| after {attack} | {share:.1%} | {100 * low:.1f} to {100 * high:.1f}% |" in text
    for label, count, clean, robust in zip(*(column.tolist() for column in result.by_class()), strict=True):
        low, high = wilson_interval(robust, count)
        assert f"| {label} | {count} | {clean:.1%} | {robust:.1%} | {100 * low:.1f} to {100 * high:.1f}% |" in text
    for eps, share in zip(result.curve.epsilons.tolist(), result.curve.accuracies.tolist(), strict=True):
        assert f"| {eps:.4g} | {share:.1%} |" in text
    confusion = result.confusion().double()
    for label, row in enumerate((100 * confusion / confusion.sum(1, keepdim=True)).tolist()):
        assert f"| {label} | " + " | ".join(f"{share:.1f}" for share in row) + " |" in text
    plan = result.plan / result.plan.sum(1, keepdim=True)
    assert "| 3 | " + " | ".join(f"{100 * share:.1f}" for share in plan[3].tolist()) + " |" in text
    counted = sum(int(count) for count in re.findall(r"^\| [\d.e-]+ to [\d.e-]+ \| (\d+) \|$", text, re.M))
    assert counted == int(result.samples["clean_right"].sum())  # of the histogram
    assert f"Distributional accuracy {result.values['distributional_acc']:.1%}" in text
    assert "Claimed on 40 samples: 50.0% under fgsm and pgd. Left after everything that the audit tried: 25.0%." in text
    assert "Do not believe the claim" in text
    for finding in AUDIT.findings:
        assert finding.figure in text
    assert "| training (s) | 12.5 |" in text
    for word in (
        "upper bound",
        "a stronger attack may leave less",
        "claim of robustness",
        "seed",
        "torch",
        "audit | 61 s",
    ):
        assert word in text, word


def test_what_is_missing_is_left_out(tmp_path):
    text = markdown(CASES["least"](), tmp_path)
    for word in ("Distances", "Transport", "Least", "by eps", "nan", "None"):
        assert word not in text, word
    assert "was not audited" in text
    assert "No settings were given" in text


def test_masks(tmp_path):
    text = markdown(CASES["masks"](), tmp_path)
    assert "of the labels of 5 masks" in text  # one of six has no label that counts
    assert "6 images with a mask each" in text
    assert "not counted by class" in text


def test_inputs_that_are_no_images(tmp_path):
    report = CASES["rows"]()
    text = markdown(report, tmp_path)
    assert "are no images, so there are no pictures" in text
    example = report.result.examples.least[0]
    assert re.search(rf"\| Least robust \| {example.sample} \| .* \| pgd \| .* \| {example.distance:.3g} \|", text)
    assert "The inputs have no bounds." in text


def test_a_diverged_model(tmp_path):
    text = markdown(CASES["diverged"](), tmp_path)
    assert "outputs of 128 clean inputs are NaN or infinite" in text
    assert "all distances are 0" in text


def test_autoattack_is_a_claim(tmp_path):
    result = dataclasses.replace(measured(False), attacks=("autoattack", "pgd"))
    result.values["robust_acc_autoattack"] = 0.5
    assert "No attack of this evaluation" not in markdown(Report("strong", result), tmp_path)
    del result.values["robust_acc_autoattack"]


@pytest.mark.parametrize("norm", Norm.__args__)
def test_threats_in_words(norm):
    text = threat_in_words(ThreatModel(norm=norm, eps=0.25, mean=(0.5,), std=None))
    assert "0.25" in text
    assert "between 0 and 1" in text
    assert "with mean 0.5 and std 1" in text


def test_eps_in_words():
    words = [eps_in_words(ThreatModel(eps=eps)) for eps in (8 / 255, 0.2, 0.03, 1 / 255)]
    assert words == ["8/255", "0.2", "0.03", "1/255"]
    assert eps_in_words(ThreatModel(norm="l2", eps=8 / 255)) == "0.03137"


@pytest.mark.parametrize(("seconds", "words"), [(0.123, "0.12 s"), (42, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_report_is_never_half_written(tmp_path, monkeypatch):
    first = CASES["least"]()
    before = {path: path.read_text() for path in first.write(tmp_path)}
    write_text, written = Path.write_text, []

    def full_disk(path, text, **options):
        if written:
            raise OSError("No space left on device")
        written.append(path)
        return write_text(path, text, **options)

    monkeypatch.setattr(storage.Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(first, name="another").write(tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "cannot be read as a report: Expecting value"),
        ('{"format": 99}', "no report of format 1, but of 99"),
        ("[1]", "no report of format 1, but of None"),
        ('{"format": 1}', "the entry 'name' is missing"),
    ],
)
def test_files_that_are_no_reports(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Report.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing"):
        Report.load(tmp_path / "nothing.json")


def test_settings_of_any_kind(tmp_path):
    settings = {
        "threat": THREAT,
        "path": tmp_path,
        "device": torch.device("cpu"),
        "rates": (1, float("inf")),
        "none": None,
    }
    text = markdown(Report("any", measured(False), settings=settings), tmp_path)
    assert str(tmp_path).replace("_", "\\_") in text
    assert Report.load(tmp_path).settings["rates"] == [1, "inf"]

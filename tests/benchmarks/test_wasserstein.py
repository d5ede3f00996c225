"""The benchmark of Wasserstein attacks: its cells, and how two attacks are compared."""

from __future__ import annotations

import json

import pytest

from benchmarks.attacks.wasserstein import __main__ as wasserstein_attacks
from benchmarks.attacks.wasserstein.report import accuracy, lead, spending


def cell(name: str, broken: list[bool], clean: list[bool] | None = None) -> dict:
    return {"attack": name, "broken": broken, "clean": clean or [False] * len(broken)}


def test_the_lead_is_paired_by_image():
    ours, theirs = [cell("ours", [True] * 6 + [False] * 4)], [cell("theirs", [True] * 2 + [False] * 8)]
    assert accuracy(ours)[0] == pytest.approx(0.4)
    found = lead(ours, theirs)
    assert found.mean == pytest.approx(0.4)
    assert 0 < found.low < 0.4 < found.high
    assert found.sign == 1
    assert found.text().startswith("+40.0 [")
    assert "±" not in found.text()  # over one model there is no interval
    assert lead(theirs, ours).mean == pytest.approx(-0.4)
    assert lead(theirs, ours).sign == -1


def test_models_that_disagree_are_no_lead():
    ours = [cell("ours", [True] * 60 + [False] * 40), cell("ours", [False] * 100)]
    theirs = [cell("theirs", [False] * 100), cell("theirs", [True] * 10 + [False] * 90)]
    found = lead(ours, theirs)
    assert found.mean == pytest.approx(0.25)
    assert found.low > 0
    # t with one degree of freedom times the standard error.
    assert found.models.half == pytest.approx(12.706 * 0.35, rel=1e-3)
    assert found.sign == 0


def test_images_that_were_wrong_before_are_nobodys_success():
    wrong = [True, True, False, False]
    ours, theirs = [cell("ours", [True, True, True, False], wrong)], [cell("theirs", [False] * 4, wrong)]
    assert accuracy(ours)[0] == pytest.approx(0.25)
    assert lead(ours, theirs).mean == pytest.approx(0.25)


def test_what_images_spend_is_a_median_over_models():
    def costs(resisting: list[float], thorough: list[float]) -> dict:
        return {"resisting": resisting, "thorough": thorough}

    groups = {
        ("a", 0.1, "ours"): [costs([0.5, 1.0], [1.0]), costs([0.995], [0.999])],
        ("a", 0.2, "ours"): [costs([], [0.9, 0.8]), costs([], [0.7])],
        ("a", 0.1, "theirs"): [{}],
    }
    text = spending(groups, "ours")
    assert "0.995 of eps or more in all 1 rows" in text
    assert "these rows: 0.800 for a at 0.2." in text
    groups.pop(("a", 0.2, "ours"))
    assert "these rows: none." in spending(groups, "ours")


def test_runs_and_goes_on_where_it_was(tmp_path, capsys):
    command = ["--quick", "--models", "undefended", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    wasserstein_attacks.main(command)
    text = (tmp_path / "wasserstein_attacks_digits.md").read_text()
    result = json.loads((tmp_path / "wasserstein_attacks_digits.json").read_text())
    assert str(tmp_path) not in text
    assert (tmp_path / "wasserstein_attacks_digits.png").stat().st_size > 10_000
    assert all(each["feasible"] for each in result["cells"])
    ours = [each for each in result["cells"] if each["attack"] == "ours"]
    assert all(len(each["resisting"]) == len(each["broken"]) - sum(each["broken"]) for each in ours)
    assert all(max(each["resisting"] + each["thorough"]) < 1 + 1e-5 for each in ours)
    left = {(each["eps"], each["attack"]): len(each["broken"]) - sum(each["broken"]) for each in result["cells"]}
    for (eps, _), count in left.items():
        assert left[eps, "ours"] <= count
    stored = sorted((tmp_path / "work").rglob("*.json"))
    times = [path.stat().st_mtime_ns for path in stored]
    wasserstein_attacks.main(command)
    assert [path.stat().st_mtime_ns for path in stored] == times

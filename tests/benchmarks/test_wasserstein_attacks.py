"""``benchmarks/wasserstein_attacks.py``: its cells, and how two attacks are compared."""

from __future__ import annotations

import json

import pytest


def cell(name: str, broken: list[bool], clean: list[bool] | None = None) -> dict:
    return {"attack": name, "broken": broken, "clean": clean or [False] * len(broken)}


def test_the_lead_is_paired_by_image():
    from wasserstein_report import accuracy, lead

    ours, theirs = [cell("ours", [True] * 6 + [False] * 4)], [cell("theirs", [True] * 2 + [False] * 8)]
    assert accuracy(ours)[0] == pytest.approx(0.4)
    mean, low, high = lead(ours, theirs)
    assert mean == pytest.approx(0.4)
    assert 0 < low < 0.4 < high
    assert lead(theirs, ours)[0] == pytest.approx(-0.4)


def test_images_that_were_wrong_before_are_nobodys_success():
    from wasserstein_report import accuracy, lead

    wrong = [True, True, False, False]
    ours, theirs = [cell("ours", [True, True, True, False], wrong)], [cell("theirs", [False] * 4, wrong)]
    assert accuracy(ours)[0] == pytest.approx(0.25)
    assert lead(ours, theirs)[0] == pytest.approx(0.25)


def test_runs_and_goes_on_where_it_was(tmp_path, capsys):
    import wasserstein_attacks

    command = ["--quick", "--models", "undefended", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    wasserstein_attacks.main(command)
    text = (tmp_path / "wasserstein_attacks_digits.md").read_text()
    result = json.loads((tmp_path / "wasserstein_attacks_digits.json").read_text())
    assert str(tmp_path) not in text
    assert (tmp_path / "wasserstein_attacks_digits.png").stat().st_size > 10_000
    assert all(each["feasible"] for each in result["cells"])
    left = {(each["eps"], each["attack"]): len(each["broken"]) - sum(each["broken"]) for each in result["cells"]}
    for (eps, _), count in left.items():
        assert left[eps, "ours"] <= count
    stored = sorted((tmp_path / "work").rglob("*.json"))
    times = [path.stat().st_mtime_ns for path in stored]
    wasserstein_attacks.main(command)
    assert [path.stat().st_mtime_ns for path in stored] == times

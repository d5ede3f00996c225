"""The benchmark of the defences, on a budget of seconds: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from benchmarks.defenses import runs as defenses_runs
from benchmarks.defenses.__main__ import main
from benchmarks.shared.variants import TUNING, Variant, candidates
from lightning_wdefense import ThreatModel
from lightning_wdefense.defenses import RECIPES

TINY = "--epochs 1 --limit-train 64 --validation 16 --test 16 --warmup-epochs 0 --validation-steps 2 --pgd-steps 2 --pgd-restarts 1 --attack-steps 2 --queries 5"


@pytest.fixture
def bench(tmp_path):
    """Runs the benchmark on a few digits, in a folder of the test."""

    def run(arguments: str, *, dataset="digits") -> int:
        places = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
        return main(["--dataset", dataset, *TINY.split(), *arguments.split(), *places])

    return run


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "results" / "defenses_digits.json").read_text())


def trained(tmp_path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/weights.pt")}


def test_writes_everything_and_a_second_call_does_nothing(bench, tmp_path, capsys):
    command = "--recipes pgd-at trades:weight=3 pgd-at+avg --seeds 2 --autoattack pgd-at"
    assert bench(command) == 0
    written = results(tmp_path)
    assert {row["label"] for row in written["rows"]} == {"pgd-at", "trades:weight=3", "pgd-at+avg"}
    assert len(written["runs"]) == 6
    run = next(run for run in written["runs"] if run["label"] == "trades:weight=3")
    assert run["changes"] == {"weight": 3}
    assert run["training"]["steps"] == 1
    assert len(run["test"]["apgd-t"]["correct"]) == 16
    assert run["test"]["apgd-t"]["accuracy"] <= run["test"]["apgd-ce"]["accuracy"] <= run["test"]["clean"]["accuracy"]
    rows = {row["label"]: row for row in written["rows"]}
    assert rows["pgd-at"]["ranked_by"] == "autoattack"
    assert rows["trades:weight=3"]["minus_pgd-at"]["measure"] == "apgd"
    table = (tmp_path / "results" / "defenses_digits.md").read_text()
    assert "| trades:weight=3 | weight=3 | 2 |" in table
    assert (tmp_path / "results" / "defenses_digits.png").stat().st_size > 10_000

    before = trained(tmp_path)
    capsys.readouterr()
    assert bench(command) == 0
    assert trained(tmp_path) == before
    assert "seed 0" not in capsys.readouterr().out


def test_resumes_after_the_last_finished_stage(bench, tmp_path, monkeypatch):
    whole, calls = defenses_runs.left, []

    def interrupted(model, attack, *rest):
        calls.append(attack.name)
        if attack.name == "apgd-t":
            raise KeyboardInterrupt
        return whole(model, attack, *rest)

    monkeypatch.setattr(defenses_runs, "left", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench("--recipes pgd-at --seeds 1")
    before = trained(tmp_path)
    assert len(before) == 1
    calls.clear()
    monkeypatch.setattr(
        defenses_runs, "left", lambda model, attack, *rest: calls.append(attack.name) or whole(model, attack, *rest)
    )
    assert bench("--recipes pgd-at --seeds 1") == 0
    assert trained(tmp_path) == before
    assert calls == ["apgd-t"]


def test_goes_on_from_its_results_where_the_work_is_lost(bench, tmp_path, capsys):
    assert bench("--recipes pgd-at trades --seeds 1") == 0
    before = results(tmp_path)
    shutil.rmtree(tmp_path / "work")
    assert bench("--recipes pgd-at trades --seeds 1") == 0
    assert not trained(tmp_path), "nothing that is known is made again"
    assert results(tmp_path)["runs"] == before["runs"]
    assert bench("--recipes pgd-at trades --seeds 1 --autoattack pgd-at") == 0
    assert len(trained(tmp_path)) == 1, "the weights are needed for the attacks that are new"
    test = {run["label"]: run["test"] for run in results(tmp_path)["runs"]}
    assert set(test["pgd-at"]) - set(test["trades"]) == {"fab-t", "square"}
    assert test["pgd-at"]["apgd-t"] == next(run["test"]["apgd-t"] for run in before["runs"] if run["label"] == "pgd-at")
    assert "trains differently" not in capsys.readouterr().out


def test_a_failed_run_does_not_stop_the_others(bench, tmp_path, monkeypatch, capsys):
    whole = defenses_runs.train

    def failing(variant, *rest):
        if variant.name == "trades":
            raise RuntimeError("out of memory")
        return whole(variant, *rest)

    monkeypatch.setattr(defenses_runs, "train", failing)
    assert bench("--recipes trades pgd-at --seeds 1") == 1
    assert "Failed, see above: trades, seed 0" in capsys.readouterr().err
    assert [row["label"] for row in results(tmp_path)["rows"]] == ["pgd-at"]


def test_a_diverged_run_is_on_the_record(bench, tmp_path):
    assert bench("--recipes pgd-at sat-features --seeds 1 --lr 1e30 --batch-size 32") == 0
    assert all(
        "not finite" in run["training"]["diverged"] or "NaN" in run["training"]["diverged"]
        for run in results(tmp_path)["runs"]
    )
    assert results(tmp_path)["rows"] == []


def test_tuning_chooses_settings_that_later_runs_use(bench, tmp_path):
    assert bench("--recipes alp --tune --tune-samples 8") == 0
    tuning = json.loads((tmp_path / "results" / "defenses_digits_tuning.json").read_text())
    tried = tuning["recipes"]["alp"]["candidates"]
    assert [each["changes"] for each in tried] == [{"weight": 0.333}, {}, {"weight": 3.0}]
    best = max(tried, key=lambda each: (each["robust"], each["clean"]))
    assert tuning["recipes"]["alp"]["chosen"] == best["changes"]
    before = trained(tmp_path)
    assert bench("--recipes alp --seeds 1") == 0
    assert trained(tmp_path) == before, "the chosen candidate is trained already"
    (row,) = results(tmp_path)["rows"]
    assert row["label"] == "alp"
    assert row["settings"] == (f"weight={best['changes']['weight']}" if best["changes"] else "preset")
    with pytest.raises(SystemExit):
        bench("--recipes sat --seeds 1")


def test_timing_compares_with_pgd_at(bench, tmp_path):
    assert bench("--recipes alp --timing --rounds 2 --block 5") == 0
    timing = {entry["label"]: entry for entry in results(tmp_path)["timing"].values()}
    assert timing["pgd-at"]["ratio"] == 1
    low, high = timing["alp"]["interval_95"]
    assert low <= timing["alp"]["ratio"] <= high


def test_candidates_are_as_many_for_every_recipe():
    threat = ThreatModel(eps=0.1)
    for name in RECIPES.keys() - TUNING.keys():
        tried = candidates(Variant.parse(name), threat)
        assert len(tried) == 3, f"TUNING needs an entry for {name}"
        for each in tried:
            each.recipe(threat)


@pytest.mark.parametrize(
    ("arguments", "dataset", "message"),
    [
        ("--recipes pgdat", "digits", "Did you mean 'pgd-at'"),
        ("--recipes pgd-at:weight", "digits", "should look like"),
        ("--recipes pgd-at:attack.nonsense=1", "digits", "cannot be made"),
        ("--recipes alp:features=nonsense", "digits", "does not run on digits"),
        ("--recipes pgd-at --autoattack trades", "digits", "--autoattack names trades"),
        ("--recipes pgd-at --epochs 0", "digits", "--epochs must be positive"),
        ("--recipes pgd-at --seeds -1", "digits", "--seeds must be at least 1"),
        ("--recipes pgd-at --limit-train 99999", "digits", "lower --limit-train"),
        ("--recipes pgd-at", "cifar100", "invalid choice"),
        ("--recipes pgd-at", "mnist", "needs --data"),
        ("--recipes pgd-at --data /nowhere", "mnist", "There is no /nowhere/mnist.npz"),
    ],
)
def test_bad_input(bench, tmp_path, capsys, arguments, dataset, message):
    with pytest.raises(SystemExit) as stopped:
        bench(arguments, dataset=dataset)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("keys", [("x_train", "y_train"), ("x_train", "y_train", "x_test", "y_test")])
def test_bad_file(bench, tmp_path, capsys, keys):
    np.savez(tmp_path / "mnist.npz", **{key: np.zeros((4, 5), dtype=np.uint8) for key in keys})
    with pytest.raises(SystemExit):
        bench(f"--recipes pgd-at --data {tmp_path}", dataset="mnist")
    assert ("lacks x_test, y_test" if len(keys) == 2 else "holds uint8 (4, 5)") in capsys.readouterr().err

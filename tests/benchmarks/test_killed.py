"""Benchmarks that are killed, at whatever moment, end with the same result at the next call."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from torch import nn

UNFINISHED = "*.wdefense-unfinished"
TINY = (
    "--dataset digits --no-tuned --recipes standard --seeds 1 --epochs 4 --lr 0.01 --eps 0.03 --limit-train 128 --validation 16 --test 16 --warmup-epochs 0 "
    "--validation-steps 1 --pgd-steps 1 --pgd-restarts 1 --attack-steps 1 --queries 2"
)


def defenses(monkeypatch, *more):
    from benchmarks.defenses import __main__ as defenses

    def run(folder):
        assert (
            defenses.main([*TINY.split(), *more, "--work", str(folder / "work"), "--output", str(folder / "results")])
            == 0
        )
        return json.loads((folder / "results" / "defenses_digits.json").read_text())

    monkeypatch.setattr(defenses, "plot", lambda *_: None)
    return run


def tuning(monkeypatch):
    from benchmarks.defenses import __main__ as defenses

    def run(folder):
        arguments = [*TINY.split(), "--tune", "--tune-samples", "8"]
        assert defenses.main([*arguments, "--work", str(folder / "work"), "--output", str(folder / "results")]) == 0
        return json.loads((folder / "results" / "defenses_digits_tuning.json").read_text())

    monkeypatch.setattr(defenses, "candidates", lambda variant, _: [variant])
    monkeypatch.setattr("benchmarks.defenses.tuning.candidates", lambda variant, _: [variant])
    return run


def wasserstein_attacks(monkeypatch):
    from benchmarks.attacks.wasserstein import __main__ as wasserstein_attacks

    def run(folder):
        places = ["--work", str(folder / "work"), "--output", str(folder)]
        wasserstein_attacks.main(["--quick", "--models", "undefended", "--epsilons", "0.1", *places])
        return json.loads((folder / "wasserstein_attacks_digits.json").read_text())

    def measure(name, network, x, y, eps, options):
        return {"broken": wasserstein_attacks.fooled(network, x + eps, y).tolist(), "seconds": 1.0, "feasible": True}

    monkeypatch.setattr(wasserstein_attacks, "measure", measure)
    monkeypatch.setattr(wasserstein_attacks, "markdown", lambda result, ours: str(result["cells"]))
    monkeypatch.setattr(wasserstein_attacks, "plot", lambda *_: None)
    return run


def detectability(monkeypatch):
    from benchmarks.detectability import __main__ as detectability

    def run(folder):
        places = ["--work", str(folder / "work"), "--output", str(folder)]
        detectability.main(["--quick", "--models", "undefended", "--attacks", "pgd-linf", *places])
        return json.loads((folder / "detectability_digits.json").read_text())

    monkeypatch.setattr(detectability, "DETECTOR_NAMES", ["energy"])
    monkeypatch.setattr(detectability, "matching_eps", lambda *_: 0.1)
    monkeypatch.setattr(detectability, "attack_all", lambda attack, network, x, y: x + 0.1 * x.flip(-1))
    monkeypatch.setattr(detectability, "evading", lambda *_: [])
    monkeypatch.setattr(detectability.Bench, "_power", lambda self, images: {"energy": len(images)})
    monkeypatch.setattr(detectability, "STATISTICS", ("energy",))
    monkeypatch.setattr(detectability, "markdown", lambda result: str(result["cells"]))
    monkeypatch.setattr(detectability, "plot", lambda *_: None)
    return run


def purifier(monkeypatch):
    from benchmarks.purifier import __main__ as purifier

    def run(folder):
        purifier.main(["--seeds", "2", "--output", str(folder), "--models", "no purifier", "trained through"])
        return json.loads((folder / "purifier_digits.json").read_text())

    def trained(protocol, images, seed, names):
        torch.manual_seed(seed)
        return {name: nn.Linear(1, 1) for name in ("no purifier", "trained through")}

    monkeypatch.setattr(purifier, "trained", trained)
    monkeypatch.setattr(purifier, "measured", lambda _, model, __: dict.fromkeys(purifier.FIGURES, float(model.weight)))
    return run


def gradients(monkeypatch):
    from benchmarks.gradients import __main__ as gradients

    def run(folder):
        gradients.main(["--seeds", "3", "--output", str(folder)])
        return json.loads((folder / "gradients.json").read_text())

    monkeypatch.setattr(gradients, "trained_stages", lambda *_: {})
    monkeypatch.setattr(
        gradients, "jobs", lambda stages, images, seed: [(name, lambda: {"points": seed + 0.5}) for name in "ab"]
    )
    monkeypatch.setattr(gradients, "plot", lambda *_: None)
    monkeypatch.setattr(gradients, "markdown", lambda results, machine: str(results))
    return run


def critic(monkeypatch):
    from benchmarks.critic import __main__ as critic
    from benchmarks.critic.accuracy import measure as accuracy

    def run(folder):
        critic.main(["--accuracy-seeds", "2", "--output", str(folder)])
        return [json.loads((folder / f"critic_{name}.json").read_text()) for name in ("sensitivity", "accuracy")]

    cells = [(name, "default", lambda dim, seed: dim + seed / 10, {}) for name in ("ours", "plain WGAN-GP")]
    monkeypatch.setattr(critic.distance, "cells", lambda: cells)
    monkeypatch.setattr(critic.distance_report, "markdown", lambda *_: "")
    monkeypatch.setattr(critic.distance_report, "plot", lambda *_: None)
    monkeypatch.setattr(accuracy, "cells", lambda: {"ours|default": 1, "no critic|default": 2})
    monkeypatch.setattr(accuracy, "accuracy", lambda critic, protocol, splits, seed, folder: {"robust": critic + seed})
    monkeypatch.setattr(accuracy, "adopt", lambda *_: None)
    monkeypatch.setattr(critic.accuracy_report, "markdown", str)
    return run


def sinkhorn(monkeypatch):
    from types import SimpleNamespace

    from benchmarks.sinkhorn import __main__ as sinkhorn
    from benchmarks.sinkhorn import problems as sinkhorn_problems

    def run(folder):
        options = SimpleNamespace(
            output=folder, rows=sinkhorn.ROWS[:2], blurs=[0.2], again=None, budget=1.0, cache=folder / "cache"
        )
        sinkhorn.run(options, "sinkhorn_cpu", one, "tiny")
        return json.loads((folder / "sinkhorn_cpu.json").read_text())

    def one(row, blur, options, _):
        return {
            "row": row.name,
            "value": sinkhorn_problems.reference(points[row.n], points[row.n], blur, options.cache).value,
        }

    points = {row.n: torch.full((1, 2), float(row.n)) for row in sinkhorn.ROWS[:2]}
    solved = sinkhorn_problems.Reference
    monkeypatch.setattr(sinkhorn_problems, "_solve", lambda x, y, eps: solved(float(x.sum()), x, y, 1.0, 0.0))
    return run


BENCHMARKS = (defenses, tuning, wasserstein_attacks, detectability, purifier, gradients, critic, sinkhorn)


def without_times(found):
    """Results, less what is another each time."""
    if isinstance(found, dict):
        times = ("seconds", "command", "_s", "_ms")
        return {key: without_times(each) for key, each in found.items() if not key.endswith(times)}
    return [without_times(each) for each in found] if isinstance(found, list) else found


def moments(run, folder, monkeypatch):
    """What a run returns, and copies of its folder as kills would leave it: before each write is in place, and with checkpoints."""
    from benchmarks.shared import files as _files

    copies, replace, remove = [], os.replace, _files._remove

    def copy():
        copies.append(shutil.copytree(folder, folder.with_name(f"killed-{len(copies)}")))

    def replacing(source, target):
        copy()
        replace(source, target)

    def removing(place):
        if place.is_dir():
            copy()
        remove(place)

    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "replace", replacing)
        patch.setattr(_files, "_remove", removing)
        return run(folder), copies


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: each.__name__)
def test_the_next_call_ends_with_the_same_result(benchmark, tmp_path, monkeypatch):
    run = benchmark(monkeypatch)
    expected, copies = moments(run, tmp_path / "undisturbed", monkeypatch)
    assert len(copies) >= 4
    for folder in copies:
        assert list(folder.rglob(UNFINISHED)), "the moment is in the middle of something"
        assert without_times(run(folder)) == without_times(expected)
        assert not list(folder.rglob(UNFINISHED)), "what the killed process left is removed"


def test_weights_never_stand_beside_a_record_of_others(tmp_path, monkeypatch):
    """Results that were brought from another machine, on which the training went another way."""
    expected = defenses(monkeypatch)(tmp_path / "first")
    brought = json.loads(json.dumps(expected))
    brought["runs"][0]["training"]["validation_pgd"] = [9.0]
    brought["runs"][0]["test"] = {"clean": {"accuracy": 1.0, "seconds": 0.0, "correct": 16 * "1"}}
    (tmp_path / "brought" / "results").mkdir(parents=True)
    (tmp_path / "brought" / "results" / "defenses_digits.json").write_text(json.dumps(brought))
    run = defenses(monkeypatch)
    found, copies = moments(run, tmp_path / "brought", monkeypatch)
    assert without_times(found) == without_times(expected)
    for folder in copies:
        assert without_times(run(folder)) == without_times(expected)


def test_weights_without_a_record_are_made_again(tmp_path, monkeypatch):
    """What 0.1.0 left when it was killed."""
    run = defenses(monkeypatch)
    expected = run(tmp_path)
    (record,) = tmp_path.glob("work/*/run.json")
    record.unlink()
    (tmp_path / "results" / "defenses_digits.json").unlink()
    # Beside it a run that this call does not ask for, killed in its training, with half a record.
    checkpoints = tmp_path / "work" / "digits-other-0" / "1.wdefense-unfinished"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "run.json").write_text('{"protocol":')
    assert without_times(run(tmp_path)) == without_times(expected)
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("benchmark", "name"), [(purifier, "purifier_digits"), (gradients, "gradients"), (critic, "critic_sensitivity")]
)
def test_two_at_once_would_undo_each_other(benchmark, name, tmp_path, monkeypatch):
    from benchmarks.shared.files import alone

    run = benchmark(monkeypatch)
    with alone(tmp_path / f"{name}.json"), pytest.raises(SystemExit, match="Another process works on"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "weights.pt", "defenses_digits.json"])
def test_an_unreadable_file_counts_as_absent(name, tmp_path, monkeypatch, capsys):
    run = defenses(monkeypatch)
    expected = run(tmp_path)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name == "weights.pt":  # which are needed for what is new alone
        run = defenses(monkeypatch, "--autoattack", "all")
        expected = run(tmp_path / "undisturbed")
    assert without_times(run(tmp_path)) == without_times(expected)
    assert f"{path} cannot be read, and counts as absent" in capsys.readouterr().err

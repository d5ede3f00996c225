"""The robust-accuracy half of the critic's sensitivity: the plain critic is the published one, runs go on, and the report counts rightly."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.critic.accuracy import measure as critic_accuracy
from benchmarks.critic.accuracy.measure import NONE, OURS, PLAIN, adopt, cells
from benchmarks.critic.accuracy.plain import PlainDiscrepancy
from benchmarks.critic.accuracy.report import AXES, markdown, spread

TINY = {
    "train": 64,
    "validation": 16,
    "test": 16,
    "epochs": 1,
    "warmup_epochs": 0.0,
    "validation_steps": 1,
    "attack_steps": 2,
}


def gaussians(steps, penalty):
    """What a plain critic says of two Gaussians at a distance of 1, after so many batches."""
    draw, labels = torch.Generator().manual_seed(0), torch.zeros(256, dtype=torch.long)
    training = PlainDiscrepancy(lr=1e-3, penalty=penalty).start(torch.zeros(4, 2), 1)
    said = []
    for _ in range(steps):
        x, y = torch.randn(2, 256, 2, generator=draw)
        said.append(training.update(x + torch.tensor([0.6, 0.8]), y, labels, generator=draw))
    return training, said


@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_plain_critic_overshoots_as_a_two_sided_penalty_does(penalty):
    training, said = gaussians(60, penalty)
    gap = sum(float(update.gap) for update in said[-20:]) / 20
    assert gap == pytest.approx(1 + 1 / (2 * penalty), rel=0.07)
    assert {update.steps for update in said} == {5}
    x, y, labels = *torch.randn(2, 8, 2), torch.zeros(8, dtype=torch.long)
    assert training.critic.bounded_gap(x, y, labels) == training.critic.gap(x, y, labels)  # which the model is given
    assert training.critic.scale == 1  # points as they are
    assert not training.critic.centre.any()


def test_plain_critic_knows_the_classes():
    training = PlainDiscrepancy().start(torch.zeros(4, 2), 3)
    points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    one, other = (training.critic(points, torch.full((5,), label)) for label in (0, 2))
    assert not torch.allclose(one, other)


def test_every_cell_differs_from_the_default_and_from_the_others():
    found = cells()
    critics = [critic for key, critic in found.items() if not key.startswith(NONE)]
    assert len(set(critics)) == len(critics)
    assert sum(key.startswith(OURS) for key in found) == 7 + 3 + 4
    assert sum(key.startswith(PLAIN) for key in found) == 7 + 3 + 3


def test_runs_are_stored_one_by_one_and_go_on(tmp_path, monkeypatch, capsys):
    protocol = dataclasses.replace(critic_accuracy.PROTOCOLS["digits"], **TINY)
    monkeypatch.setitem(critic_accuracy.PROTOCOLS, "digits", protocol)
    wanted = {key: critic for key, critic in critic_accuracy.cells().items() if key.endswith("default")}
    monkeypatch.setattr(critic_accuracy, "cells", lambda: wanted)
    path = tmp_path / "critic_accuracy.json"
    critic_accuracy.measure(path, 1, "digits", None, "here")
    first = json.loads(path.read_text())["digits"]["results"]
    assert first.keys() == wanted.keys()
    assert all(0 <= runs["0"]["robust"] <= runs["0"]["clean"] <= 1 for runs in first.values())
    capsys.readouterr()
    critic_accuracy.measure(path, 1, "digits", None, "here")
    assert not capsys.readouterr().out
    monkeypatch.setitem(critic_accuracy.PROTOCOLS, "digits", dataclasses.replace(protocol, eps=0.1))
    with pytest.raises(ValueError, match="another protocol"):
        critic_accuracy.measure(path, 1, "digits", None, "here")


def test_takes_over_what_the_benchmark_of_the_defences_has_measured(tmp_path):
    def run(recipe, changes, seed=0, averaged=False):
        test = {"clean": {"accuracy": 0.9}, "apgd-t": {"accuracy": 0.5}}
        return {"recipe": recipe, "changes": changes, "seed": seed, "averaged": averaged, "test": test}

    runs = [run("pgd-at", {}, 1), run("critic", {}), run("critic", {"discrepancy.lr": 0.16}), run("trades", {})]
    runs += [run("critic", {"weight": 0.3, "discrepancy.lr": 0.05}, 2), run("pgd-at", {}, 2, averaged=True)]
    path = tmp_path / "defenses_digits.json"
    path.write_text(json.dumps({"protocol": {"eps": 0.2}, "runs": runs}))
    found = {"ours|default": {"0": {"robust": 0.4}}}
    adopt(found, {"eps": 0.1}, path)
    assert list(found) == ["ours|default"]
    adopt(found, {"eps": 0.2}, path)
    assert {key: list(each) for key, each in found.items()} == {
        "ours|default": ["0"],
        "no critic|default": ["1"],
        "ours|lr x 3.16": ["0"],
    }
    assert found["ours|default"]["0"] == {"robust": 0.4}
    assert found["ours|lr x 3.16"]["0"]["robust"] == 0.5


def test_report_takes_spreads_within_seeds_and_names_what_diverged():
    runs = {f"{OURS}|{setting}": {"0": {"robust": 0.5}, "1": {"robust": 0.4}} for setting in AXES["steps"]}
    runs[f"{OURS}|default"] = {"0": {"robust": 0.56}, "1": {"robust": 0.44}}
    runs[f"{OURS}|10 steps"]["2"] = {"robust": 0.9}  # which the others lack
    runs[f"{PLAIN}|lr x 20"] = {"0": {"diverged": "loss = nan"}}
    found = spread(runs, OURS, AXES["steps"])
    assert (round(found.mean, 3), found.count) == (0.05, 2)
    assert spread(runs, PLAIN, AXES["steps"]) is None
    text = markdown({"hardware": "here", "digits": {"protocol": {"eps": 0.2, "epochs": 1, "test": 2}, "results": runs}})
    assert "plain WGAN-GP|lr x 20, seed 0" in text
    assert "| 5 steps | 50.0 ± 76.2 (2) |" in text

"""The benchmark of gradients, on a budget of seconds: what it writes, and that its measures say what is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.gradients import __main__ as gradients
from benchmarks.gradients.measures import Pairs, fresh_samples, gaussians, known_pairs, true_gradient
from benchmarks.gradients.report import Count, count

LOSSES = ["paired L2", "Sinkhorn", "Sinkhorn p=1", "sliced", "critic"]


def pairs(images=96, alike=False):
    """A linear map and points that an attack has moved, each its own way."""
    torch.manual_seed(0)
    clean, moved = torch.randn(2, 1 if alike else images, 6).expand(2, images, 6)
    return Pairs(nn.Linear(6, 4), clean, clean + moved, torch.arange(images) % 10)


def of_pairs(data, loss, size=16):
    return known_pairs(data, true_gradient(data, loss, 0, 20), loss, size, 0, 20, 6)


def of_gaussians(loss, dim, distance):
    return fresh_samples(gaussians(dim, 0), gaussians(dim, 1), loss, distance, 64, 0, 60, 3)


def test_gradients_of_minibatches_that_are_the_same_agree():
    found = of_pairs(pairs(alike=True), "paired L2")
    assert found["parameters agree"] == pytest.approx(1, abs=1e-4)
    assert found["parameters true"] == pytest.approx(1, abs=1e-4)
    assert found["noise"] < 1e-3


def test_only_paired_l2_does_not_depend_on_the_rest_of_the_batch():
    data = pairs()
    known = of_pairs(data, "paired L2")
    assert known["points agree"] == known["points true"] == pytest.approx(1, abs=1e-4)
    for loss in ("Sinkhorn", "Sinkhorn p=1", "sliced"):
        assert of_pairs(data, loss)["points agree"] < 0.98
    assert known["parameters agree"] < known["parameters true"] < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_gaussians_far_apart_point_along_the_shift(loss):
    found = of_gaussians(loss, 2, 12.0)
    assert found["points true"] > 0.9
    assert found["parameters true"] > 0.8
    force = {"sliced": 6, "critic": 1, "Sinkhorn p=1": 1}.get(loss, 12)
    assert found["pull"] == pytest.approx(force, rel=0.1)


def test_where_pairs_are_random_l2_pulls_the_cloud_together_and_the_critic_does_not():
    assert of_gaussians("paired L2", 8, 1.0)["points true"] < 0.4
    assert of_gaussians("critic", 8, 1.0)["points true"] > 0.8


def test_counts_what_is_better_worse_and_not_separated():
    def cell(values):
        return {str(seed): {"points agree": value} for seed, value in enumerate(values)}

    results = {}
    for setting, values in {"up": (0.6, 0.8, 0.7), "down": (0.2, 0.4, 0.3), "same": (0.7, 0.3, 0.5)}.items():
        results[f"known pairs|{setting}|16|paired L2"] = cell((0.45, 0.55, 0.5))
        results[f"known pairs|{setting}|16|sliced"] = cell(values)
    assert count(results, "known pairs", ("sliced",), "points agree") == Count(1, 1, 1)
    assert count(results, "known pairs", ("sliced",), "points agree", "up") == Count(1, 0, 0)


def test_writes_everything_and_goes_on(tmp_path, monkeypatch, capsys):
    whole = gradients.load
    monkeypatch.setattr(gradients, "load", lambda *args: (found := whole(*args))._replace(train=found.train.first(128)))
    tiny = {"EPOCHS": (1,), "SIZES": (64,), "DIMENSIONS": (2,), "DISTANCES": (4.0,), "UPDATES": 3, "PROBES": 2}
    for name, value in tiny.items():
        monkeypatch.setattr(gradients, name, value)
    command = ["--output", str(tmp_path), "--seeds"]
    gradients.main([*command, "1"])
    first = json.loads((tmp_path / "gradients.json").read_text())["results"]
    assert len(first) == 2 * 6 + 2 * 5
    capsys.readouterr()
    gradients.main([*command, "2"])
    assert "seed 0:" not in capsys.readouterr().out
    second = json.loads((tmp_path / "gradients.json").read_text())["results"]
    assert all(second[key]["0"] == first[key]["0"] and second[key]["1"] != first[key]["0"] for key in first)
    assert "| known pairs | parameters | steadier |" in (tmp_path / "gradients.md").read_text()
    assert (tmp_path / "gradients.png").stat().st_size > 10_000

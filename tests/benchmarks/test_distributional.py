"""The benchmark of the shared budget, on a budget of seconds: it resumes, and compares at equal clean accuracy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.distributional import __main__ as distributional
from benchmarks.distributional import measuring, training
from benchmarks.distributional.report import accuracy, certified, frontier, on_frontier, summary, verdict
from benchmarks.shared.statistics import Estimate


@pytest.fixture
def digits(tmp_path):
    """Random images in the file that the benchmark reads, of classes that differ in brightness."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 1300)
    images = (60 * generator.random((1300, 28, 28)) + 150 * labels[:, None, None]).astype(np.uint8)
    np.savez(
        tmp_path / "mnist.npz", x_train=images[:1200], y_train=labels[:1200], x_test=images[1200:], y_test=labels[1200:]
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_trains_measures_and_resumes(digits, monkeypatch):
    monkeypatch.setattr(measuring, "STEPS", 3)
    monkeypatch.setattr(measuring, "SAMPLES", 50)
    monkeypatch.setattr(measuring, "RADII", {"l2": (0.5, 1.0), "linf": (0.1,)})
    places = ["--data", str(digits), "--work", str(digits / "work"), "--output", str(digits)]
    small = [
        *places,
        "--seeds",
        "1",
        "--train",
        "128",
        "--epochs",
        "2",
        "--test",
        "20",
        "--clean",
        "90",
        "--certified",
        "2",
    ]
    distributional.main(["train", *small, "--models", "standard", "pgd-at 1.5", "gaussian-noise"])

    def never(*_):
        raise AssertionError("what is known is not made again")

    monkeypatch.setattr(training, "train", never)
    distributional.main(["train", *small, "--models", "standard", "gaussian-noise"])
    distributional.main(["measure", *small])
    found = json.loads((digits / "distributional_mnist.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["standard", "pgd-at 1.5", "gaussian-noise"]
    assert set(found["w-pgd"]) == {"standard", "pgd-at 1.5"}
    text = (digits / "distributional_mnist.md").read_text()
    assert "clean accuracy on 90 test images, all else on 20 of them" in text
    assert "W-PGD leaves less than the greedy adversary in" in text
    assert (digits / "distributional_mnist.png").stat().st_size > 10_000
    monkeypatch.setattr(measuring, "distances", never)
    distributional.main(["measure", *small])
    monkeypatch.setattr(measuring, "STEPS", 4)
    with pytest.raises(AssertionError, match="not made again"):  # but other settings are measured anew
        distributional.main(["measure", *small])


def run(clean: float, *distances: float, sure: tuple[float, ...] = ()) -> dict:
    return {"clean": clean, "l2": list(distances)} | ({"certified": list(sure)} if sure else {})


RUNS = {
    "standard": {0: run(0.90, 0.1, 0.1)},
    "pgd-at 1": {0: run(0.98, 0.4, 0.6)},
    "pgd-at 2": {0: run(0.94, 0.8, 1.2)},
    "trades": {0: run(0.96, 0.6, 0.9, sure=(0.0, 0.5))},
}


def mean_distance(run: dict) -> float:
    return float(np.mean(run["l2"]))


def test_a_model_that_is_beaten_in_both_is_no_point_of_the_frontier():
    assert frontier(RUNS, 0, mean_distance) == [(0.94, 1.0), (0.98, 0.5)]


def test_the_frontier_is_interpolated_and_ends():
    for clean, expected in ((0.96, 0.75), (0.97, 0.625), (0.99, 0.5), (0.5, 1.0)):
        assert on_frontier(RUNS, {0: clean}, mean_distance)[0] == pytest.approx(expected)


def test_rows_are_those_of_the_metric():
    runs = {**RUNS, "pgd-at 1.5": {0: run(0.96, 0.6, 0.9)}}
    rows = {row["model"]: row for row in summary(runs)}
    assert rows["trades"]["eps 1"].mean == 0
    assert rows["trades"]["W_2 0.25"].mean == pytest.approx(1 - 0.25**2 / 0.6**2)
    assert rows["trades"]["W_2 0.25 - control"].mean == 0
    assert accuracy(runs["trades"][0], "l2", torch.inf, 0.7) == 0.5
    (sure,) = certified(runs)
    assert sure["eps 0.25"].mean == 0.5
    assert sure["W_1 0.25"].mean == 0  # half of the mass times 0.5


def test_an_interval_that_holds_0_is_a_tie():
    assert verdict(Estimate(0.02, 0.03, 5)) == "tie"
    assert verdict(Estimate(0.02, None, 1)) == "tie"
    assert verdict(Estimate(-0.04, 0.03, 5)) == "worse"
    assert verdict(Estimate(0.04, 0.03, 5)) == "better"

"""Two processes (gloo): one model, one learned state, and noise of its own on each rank, whatever the recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from callbacks import test_detection_monitor, test_monitor_environments
from support.processes import run_pair

from lightning_wdefense.defenses import RECIPES

TESTS = Path(__file__).parents[1]
CASES = [*(name for name in RECIPES if name != "standard"), "trades+awp", "udr+awp", "mixin:udr", "mixin:critic"]
CASES += ["step:pgd-at", "step:trades", "step:class-transport", "step:udr", "step:pgd-at+awp"]


def ranks_end_with_the_same_weights_and_have_learned_the_same(ranks):
    for recipe in CASES:
        first, second = (rank[recipe] for rank in ranks)
        assert torch.equal(first["weights"], second["weights"]), recipe
        assert first["learned"] == second["learned"], recipe
        assert (first["learned"]["multiplier"] is not None) == recipe.split(":")[-1].startswith("udr"), recipe
        assert (first["learned"]["critic"] is not None) == recipe.split(":")[-1].startswith("critic"), recipe


def noise_differs_by_rank(ranks):
    first, second = (rank["perturbations"] for rank in ranks)
    assert len(first) == 3
    assert not torch.equal(first, second)


def ranks_hold_the_same_purifier_and_critic(ranks):
    first, second = (rank["purifier"] for rank in ranks)
    assert first == second
    assert first["learned"]["wasserstein_purifier"]["critic"]["batches"] == 20


def the_monitor_reduces_the_users_own_metrics_over_ranks(ranks):
    first, second = (rank["monitor"] for rank in ranks)
    assert first == second
    # Both of them are of all samples, as the monitor's own is.
    assert first["robust/accuracy"] == pytest.approx(first["val/robust_acc"])
    assert first["robust/right"] == pytest.approx(first["val/robust_acc"])
    assert first["accuracy"] == pytest.approx(first["val/clean_acc"])
    assert first["robust/accuracy"] < first["accuracy"]


def robustness_is_that_of_one_process(ranks):
    expected = test_monitor_environments.values_of_one_process()
    for values in (rank["robustness"] for rank in ranks):
        for key, value in expected.items():
            if key not in ("val/loss", "val/transport_shift"):  # the module's own clean loss is of one rank
                assert values[key] == pytest.approx(value, abs=1e-6), key
        assert values["val/transport_shift"] == pytest.approx(expected["val/transport_shift"], rel=0.01)


def detectors_learn_from_both_processes(ranks):
    # Each process has every second sample, and of those attacks every second one.
    expected = test_detection_monitor.by_hand(judged=torch.arange(128) // 2 % 2 == 1)
    for values in (rank["detection"] for rank in ranks):
        for name, value in expected.items():
            assert values[f"val/auroc_{name}"] == pytest.approx(value, abs=2e-3), name


def test_two_processes(tmp_path):
    """One test for all: a worker that took some of its parts would start the processes again, which takes longer than their work."""
    command = [sys.executable, str(TESTS / "callbacks" / "ddp_script.py"), str(tmp_path), *CASES]
    ranks = run_pair(command, tmp_path, timeout=1800)
    failed = []
    for check in (
        ranks_end_with_the_same_weights_and_have_learned_the_same,
        noise_differs_by_rank,
        ranks_hold_the_same_purifier_and_critic,
        the_monitor_reduces_the_users_own_metrics_over_ranks,
        robustness_is_that_of_one_process,
        detectors_learn_from_both_processes,
    ):
        try:
            check(ranks)
        except AssertionError as error:
            failed.append(f"{check.__name__}: {error}")
    assert not failed, "\n".join(failed)

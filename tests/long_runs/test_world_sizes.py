"""A run that is resumed on another number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from long_runs.world_script import SAMPLES, SIZE, THREAT, WARMUP, train
from support.processes import run_ranks

CASES = ["udr", "critic", "class-transport", "trades+awp"]
SCRIPT = Path(__file__).with_name("world_script.py")


def eps_of(epoch, ranks):
    """The eps of each batch of an epoch, on so many processes."""
    batches = SAMPLES // SIZE // ranks
    return [THREAT.eps * min(1.0, (epoch + (batch + 1) / batches) / WARMUP) for batch in range(batches)]


@pytest.mark.slow
def test_from_one_process_to_two_and_back(tmp_path):
    """One test for all, because the processes take longer to start than to train."""
    alone = {case: train(case, 1, 1, None, tmp_path / f"{case}.ckpt") for case in CASES}
    ranks = run_ranks(SCRIPT, tmp_path / "two", 2, str(tmp_path), *CASES)
    for case in CASES:
        back = train(case, 1, 2, tmp_path / "two" / f"{case}.ckpt", tmp_path / "unused.ckpt")
        first, second = (rank[case] for rank in ranks)
        # What a run starts with is what the other one left, on every rank.
        assert back["start"] == first["together"]["end"] == second["together"]["end"], case
        assert first["on from one"]["start"] == second["on from one"]["start"] == alone[case]["end"], case
        # The warm-up goes on where it stood, whatever the number of batches in an epoch.
        assert alone[case]["eps"] == pytest.approx(eps_of(0, 1)), case
        assert first["together"]["eps"] == pytest.approx(eps_of(0, 2)), case
        assert back["eps"] == pytest.approx(eps_of(1, 1)), case
        assert first["on from one"]["eps"] == pytest.approx(eps_of(1, 2)), case
        # The ranks stay one, and the counts go on.
        for part in ("together", "on together", "on from one"):
            assert first[part]["end"] == second[part]["end"], f"{case}: {part}"
        assert back["end"]["learned"]["batches"] == 4 + 8
        assert first["on from one"]["end"]["learned"]["batches"] == 8 + 4
        # Other batches, other noise: the weights part.
        assert back["end"]["weights"] != first["on together"]["end"]["weights"], case
        assert back["start"]["monitored"]["val/robust_acc"] <= back["start"]["monitored"]["val/clean_acc"]
        assert back["end"]["epoch"] == first["on from one"]["end"]["epoch"] == 1

"""Two processes (gloo): the values and samples are those of both, whoever has how many batches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from evaluation.ranks_script import SHARES, by_distance, measured
from support.lightning_modules import digits_loaders, trained_classifier
from support.processes import run_pair

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(
        trained_classifier(batch_norm=True).state_dict(), folder / "model.pt"
    )  # trained anew it may differ in a bit
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(TESTS / "evaluation" / "ranks_script.py"), str(folder)]
    return run_pair(command, folder, timeout=900)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes(ranks):
    """One test for all: a worker that took some of its parts would start the processes again, which takes longer than their work."""
    first, second = ranks
    alone = measured(trained_classifier(batch_norm=True).net, list(digits_loaders()[1]))
    for share, indices in SHARES.items():
        assert first[share]["values"] == second[share]["values"]
        assert all(map(torch.equal, first[share]["curve"], second[share]["curve"]))
        for name, value in alone.values.items():
            # Each rank keeps features of its own samples, so their order is another one.
            assert first[share]["values"][name] == pytest.approx(value, rel=1e-3 if name == "transport_shift" else 1e-6)
        expected = alone.samples | {"rank": torch.repeat_interleave(torch.tensor([32 * len(it) for it in indices]))}
        for samples in (first[share]["samples"], second[share]["samples"]):
            assert samples.keys() == expected.keys()
            assert all(torch.equal(samples[name], column) for name, column in expected.items())
        values, curve, lengths, examples, plan, _ = by_distance(
            trained_classifier(batch_norm=True).net, list(digits_loaders()[1])
        )
        assert first[share]["distances"][5] == second[share]["distances"][5]  # seconds of the slowest
        for each in (first[share]["distances"], second[share]["distances"]):
            for name, value in values.items():
                assert each[0][name] == pytest.approx(value, rel=1e-3 if name == "transport_shift" else 1e-6)
            assert all(map(torch.equal, each[1], curve))
            assert torch.equal(each[2], lengths)
            for one, other in zip(each[3], examples, strict=True):
                assert one[:5] == other[:5]
                assert torch.equal(one[5], other[5])
            torch.testing.assert_close(each[4], plan, atol=1e-4, rtol=0)
    assert first["wrapped"]
    assert first["fabric"] == second["fabric"] == first["unequal"]["values"]
    assert not torch.equal(first["perturbations"], second["perturbations"])
    assert first["failure"].startswith("RuntimeError: The evaluation failed on rank 1")
    assert second["failure"].startswith("ValueError: The labels run from")
    assert second["failure"] in first["failure"]
    assert first["empty"] == second["empty"]
    assert first["empty"].startswith("ValueError: The loader gave no batch")
    # Rank 0 failed in its third batch; rank 1 had finished. Each goes on with its own file.
    assert first["interrupted"].startswith("ValueError: The labels run from")
    assert second["interrupted"].startswith("RuntimeError: The evaluation failed on rank 0")
    for found in ranks:
        assert found["files"] == ["work.pt.rank0", "work.pt.rank1"]
        assert found["resumed"]["values"] == found["uninterrupted"]["values"]
        for name, column in found["resumed"]["samples"].items():
            assert torch.equal(column, found["uninterrupted"]["samples"][name])

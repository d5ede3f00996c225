"""One rank, two and three (gloo) train the same model on the same batch: with ``gather`` by every recipe that compares samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.processes import run_ranks

SCRIPT = Path(__file__).with_name("loop_script.py")

BY_SAMPLE = ["pgd-at", "trades", "mart", "alp", "alp-features", "udr", "wrm", "pgd-at+awp", "trades+awp"]
BY_SAMPLE += ["distributional-at", "distributional-trades", "pgd-at+reweighting", "trades+reweighting+awp"]
"""Recipes whose loss is a mean over samples, or whose ranks share a budget or weights by themselves: they need no ``gather``."""

COMPARING = ["sat", "sat-label", "sat-features", "class-transport", "mmd", "coral", "critic"]
GATHERED = [
    *(f"{name}+gather" for name in COMPARING),
    "trades+gather",
    "class-transport+gather+awp",
    "critic+gather+accumulate",
    "otjr+gather",
]

HALVES = ["sat", "class-transport"]
"""Without ``gather`` the discrepancy of two ranks is the mean of those of their halves."""

ALONE = ["alp", "sat", "sat-label", "class-transport", "mmd", "coral"]
ONLY = [f"only:{name}+{split}" for name in ALONE for split in ("even", "uneven")]
SHARED = ["shared:budget", "shared:order-1", "shared:reweighting"]
"""Attacks and weights of samples that are split unevenly, so that one of three ranks has none."""
EVERYWHERE = [*BY_SAMPLE, *GATHERED, *ONLY, *SHARED]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = {1: [f"{name}+halves" for name in HALVES], 2: HALVES, 3: []}
    return {n: run_ranks(SCRIPT, folder / str(n), n, str(n), *EVERYWHERE, *cases[n]) for n in (1, 2, 3)}


def assert_same(results, expected, case):
    for rank, result in enumerate(results):
        for step, (one, other) in enumerate(zip(result["steps"], expected["steps"], strict=True)):
            for key in other:
                where = f"{case}: {key} of step {step} on rank {rank}: "
                torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=5e-6, msg=where.__add__)
        assert_learned(result["learned"], expected["learned"], case)


def assert_learned(one, other, case):
    if isinstance(other, dict):
        assert one.keys() == other.keys(), case
        for key in other:
            assert_learned(one[key], other[key], f"{case}: {key}")
    elif isinstance(other, list):
        assert len(one) == len(other), case
        for first, second in zip(one, other, strict=True):
            assert_learned(first, second, case)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5), case
    else:
        assert one == other, case


@pytest.mark.slow
def test_ranks_train_as_one(found):
    """One test for all: each worker that took a part would start all processes again."""
    (alone,) = found[1]
    for case in [*BY_SAMPLE, *GATHERED]:
        for n in (2, 3):
            assert_same([rank[case] for rank in found[n]], alone[case], f"{case} on {n} ranks")
    for case in HALVES:
        assert_same([rank[case] for rank in found[2]], alone[f"{case}+halves"], f"{case} without gather")
        with pytest.raises(AssertionError):  # the comparison sees the difference that gather makes
            assert_same([rank[case] for rank in found[2]], alone[f"{case}+gather"], case)
    for case in ONLY:
        for n in (2, 3):
            value, clean, moved = ([rank[case][key] for rank in found[n]] for key in ("value", "clean", "moved"))
            torch.testing.assert_close(value, [alone[case]["value"]] * n, rtol=1e-5, atol=1e-7)
            # Also where a rank has fewer samples than others, or none.
            torch.testing.assert_close(torch.cat(clean), alone[case]["clean"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(torch.cat(moved), alone[case]["moved"], rtol=1e-5, atol=1e-7)
    for case in SHARED:
        for n in (2, 3):
            everyone = torch.cat([rank[case]["rows"] for rank in found[n]])
            torch.testing.assert_close(
                everyone, alone[case]["rows"], rtol=1e-5, atol=1e-6, msg=f"{case} on {n} ranks: ".__add__
            )
            assert sum(rank[case]["value"] for rank in found[n]) / n == pytest.approx(alone[case]["value"], rel=1e-5)

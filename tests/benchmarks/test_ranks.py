"""The benchmark of several ranks, on a budget of seconds: what it writes, and that its arithmetic is what was counted."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale.ranks import __main__ as ranks
from benchmarks.scale.ranks.report import amount
from benchmarks.scale.ranks.traffic import cost


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    ranks.main(["--blocks", "1", "--sizes", "64", "96", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "ranks_cpu.json").read_text())
    assert list(result["steps"]) == ["one rank", "two ranks", "two ranks, gather"]
    assert all(len(seconds) == ranks.BLOCK and min(seconds) > 0 for seconds in result["steps"].values())
    for n, row in result["rows"].items():
        assert row["n_iter"] > 1
        # The check of a given start and the answer at the end are passes as well.
        assert row["bytes"] == pytest.approx(cost(2, int(n) // 2, 64, row["n_iter"]).shared_traffic, rel=0.3)
    assert (tmp_path / "ranks_cpu.md").read_text().strip() == capsys.readouterr().out.strip()


def test_arithmetic():
    two, four = cost(2, 8, 3, 1), cost(4, 8, 3, 1)
    assert two.gathered == 8 * (2 * 3 * 4 + 8)
    assert (four.whole_entries, four.shared_entries) == (32**2, 8 * 32)
    assert two.shared_traffic == 4 * (16 + 8)
    assert four.shared_operations * 4 > four.whole_operations  # the columns are computed besides


def test_amounts():
    assert [amount(n) for n in (12, 1234, 5e6, 2.5e16)] == ["12 B", "1.23 kB", "5 MB", "25 PB"]

"""Sinkhorn problems whose rows are shared among ranks (gloo): value, potentials and gradients are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks.sharing_script import NOT_SHARED, OPTIONS
from support.processes import run_ranks

SCRIPT = Path(__file__).with_name("sharing_script.py")


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shared_rows(n, tmp_path):
    for rank in run_ranks(SCRIPT, tmp_path, n):
        own = slice(*rank["own"])
        for name in (*OPTIONS, *NOT_SHARED):
            shared, alone = rank[name]["shared"], rank[name]["alone"]
            assert (rank[name]["messages"] > 0) == (name in OPTIONS), name
            coarse = name == "float32"  # the order of the sums shows, up to the tolerance of the iteration
            if name in OPTIONS and not coarse:
                assert shared["n_iter"] == alone["n_iter"], name
            for key in ("value", "f", "g", "x", "y"):
                part = own if key in "xy" else slice(None)
                one, other, where = shared[key], alone[key], f"{name} {key}: "
                one, other = (one[part], other[part]) if one.ndim else (one, other)
                tolerance = {"rtol": 1e-2, "atol": 1e-3} if coarse else {"rtol": 1e-6, "atol": 1e-9}
                torch.testing.assert_close(one, other, **tolerance, msg=where.__add__)
            for key in (
                ("x", "y") if name in OPTIONS else ()
            ):  # the gradient in the samples of other ranks is theirs to compute
                assert not torch.cat([shared[key][: own.start], shared[key][own.stop :]]).any(), name

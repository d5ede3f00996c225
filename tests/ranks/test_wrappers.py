"""Loops of one's own on two ranks (gloo), by DistributedDataParallel and by Fabric, train the model that Lightning trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.processes import run_ranks

SCRIPT = Path(__file__).with_name("wrappers_script.py")
CASES = ["pgd-at", "trades", "class-transport+gather", "critic", "udr", "trades+awp"]


@pytest.mark.slow
def test_wrapped_models(tmp_path):
    first, second = run_ranks(SCRIPT, tmp_path, 2, *CASES)
    for case in CASES:
        lightning = first[case]["by_lightning"]
        for key, value in lightning.items():
            for kind in ("by_ddp", "by_fabric"):
                where = f"{case}, {kind}, {key}: "
                torch.testing.assert_close(first[case][kind][key], value, rtol=0, atol=0, msg=where.__add__)
            if "running" not in key:  # DDP sends the buffers of rank 0 before a forward pass, so the last ones differ
                assert torch.equal(second[case]["by_ddp"][key], value), (case, key)
    plain, lossy = first["class-transport+gather"]["by_fabric"], first["bf16"]
    assert not torch.equal(plain["net.conv.weight"], lossy["net.conv.weight"])
    for key, value in lossy.items():
        assert value.isfinite().all(), key
    for key, value in first.get("whole", {}).items():
        torch.testing.assert_close(
            first["sharded"][key], value, rtol=1e-5, atol=1e-6, msg=f"fully_shard, {key}: ".__add__
        )


@pytest.mark.slow
def test_unequal_batches_are_named_before_the_first(tmp_path):
    for rank in run_ranks(SCRIPT, tmp_path, 2):
        assert rank["unequal"].startswith(
            "MisconfigurationException after 0 batches: The ranks have different numbers of"
        )
        assert "rank 0: 3, rank 1: 2" in rank["unequal"]

"""Two processes (gloo): one model, and noise of its own on each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("recipe", ["pgd-at", "sat-features"])
def test_ranks_end_with_the_same_weights(recipe, tmp_path):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }
    command = [sys.executable, str(TESTS / "callbacks" / "ddp_script.py"), recipe, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert len(first["perturbations"]) == 3
    assert not torch.equal(first["perturbations"], second["perturbations"])

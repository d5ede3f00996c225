"""An evaluation in a process of its own, which is killed half-way and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.autoattack.models import NETWORKS
from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import PGD
from lightning_wdefense.evaluation.resuming import finished_batches

LOG = "attacked.log"
"""A line for every batch that is attacked, in the working directory of the process."""

PATIENCE = 120
"""Seconds after which something is wrong."""


class Counting(PGD):
    """Notes every batch that it attacks."""

    def perturb(self, problem: Any) -> Tensor:
        with Path(LOG).open("a") as log:
            log.write("a batch\n")
        return super().perturb(problem)


def evaluated(folder: Path, work: str) -> None:
    """Evaluate as the folder says, and write what was found beside the file of finished batches."""
    asked = torch.load(folder / "asked.pt", weights_only=True)
    model, threat = NETWORKS[asked["network"]](), ThreatModel(**asked["threat"])
    model.load_state_dict(asked["weights"])
    attacks = {"pgd": Counting(threat, steps=asked["steps"])}
    result = evaluate(model.eval(), asked["batches"], threat, attacks, epsilons=[threat.eps / 2], progress=False, resume=folder / work)  # fmt: skip
    torch.save((result.values, result.samples, tuple(result.curve)), folder / f"{work}.result")


def killed_and_resumed(
    model: nn.Module, network: str, batches: list[tuple[Tensor, Tensor]], threat: ThreatModel, folder: Path, steps: int
) -> dict[str, Any]:
    """What is left after SIGKILL half-way: whether the figures are the same to the bit, and how many batches were attacked twice."""
    asked = {"batches": batches, "threat": asdict(threat), "steps": steps, "network": network}
    torch.save(asked | {"weights": model.state_dict()}, folder / "asked.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}

    def started(work: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.attacks.evaluation.killed", str(folder), work]
        return subprocess.Popen(command, env=environment, cwd=folder)

    def attacked() -> int:
        return (folder / LOG).read_text().count("\n")

    process, half, deadline = started("killed.pt"), len(batches) // 2, time.monotonic() + PATIENCE
    while (
        finished_batches(folder / "killed.pt").batches < half and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    status, kept, before = process.wait(), finished_batches(folder / "killed.pt").batches, attacked()
    failed = started("killed.pt").wait()
    after = attacked() - before
    failed |= started("undisturbed.pt").wait()
    if failed:
        raise RuntimeError("The evaluation failed after the kill.")
    found, expected = (
        torch.load(folder / f"{name}.pt.result", weights_only=True) for name in ("killed", "undisturbed")
    )
    return {
        "exit_status": status,
        "batches_kept": kept,
        "attacks_expected_after": 2 * (len(batches) - kept),
        "attacks_after": after,
        "same_values": found[0] == expected[0],
        "same_samples": all(torch.equal(column, expected[1][name]) for name, column in found[1].items()),
        "same_curve": all(map(torch.equal, found[2], expected[2])),
        "file_kb": round((folder / "killed.pt").stat().st_size / 1024, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    evaluated(Path(sys.argv[1]), sys.argv[2])

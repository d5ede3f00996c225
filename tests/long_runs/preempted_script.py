"""Jobs of SLURM's that wait for the signals of another process, one after the other; run by test_preempted.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from long_runs.job import Run


def main(folder: Path, *jobs: str) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        case, moment = job.split(":")
        place = folder / job

        def waits(place: Path = place) -> None:
            (place / "waits").touch()
            end = time.monotonic() + 120
            while not (place / "goes_on").exists() and time.monotonic() < end:
                time.sleep(0.01)

        place.mkdir()
        try:
            Run(case, place, moment, waits, slurm=True).fit()
        except SIGTERMException:
            (place / "ended").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""A process that another one preempts, as SLURM does: a signal to requeue, then one to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from long_runs.job import AFTER, INTERRUPTED, Run, assert_goes_on

TESTS = Path(__file__).parents[1]
JOBS = ["pgd-at:attack", "udr:training step", "critic:backward", "trades+awp:before backward", "critic+awp:measurement"]


@pytest.mark.slow
def test_preempted_jobs_end_as_if_nothing_had_happened(tmp_path):
    """One test for all, because a process takes longer to start than its jobs take."""
    variables = {"JOB_ID": "4321", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    environment = {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in variables.items()},
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("preempted_script.py")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), *JOBS], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:

        def wait_for(path):
            end = time.monotonic() + 300
            while not path.exists():
                waits = process.poll() is None and time.monotonic() < end
                assert waits, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)

        for job in JOBS:
            place = tmp_path / job
            wait_for(place / "waits")
            process.send_signal(signal.SIGUSR1)
            wait_for(place / "hpc_ckpt_1.ckpt")
            process.send_signal(signal.SIGTERM)
            (place / "goes_on").touch()
        process.wait(300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    for job in JOBS:
        case, moment = job.split(":")
        assert (tmp_path / job / "ended").exists(), job
        whole = Run(case, tmp_path).fit().left()
        resumed = Run(case, tmp_path / job).fit("hpc", seed=9).left()
        assert_goes_on(resumed, whole, AFTER.get(moment, INTERRUPTED))

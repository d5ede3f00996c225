"""Several processes: started together, and groups of gloo that are left in good order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def group_ends() -> Iterator[None]:
    """A process group that is made inside, by whomever, is left at the end by all processes together.

    A group that lives on when the interpreter ends has threads that may still hold the tensors of the last collective. To free them
    they need the interpreter; where that has gone the process aborts with "terminate called without an active exception". Lightning
    leaves groups of gloo to that end.
    """
    try:
        yield
        dist.barrier()  # not after an error: the others may never get there
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def script_environment() -> dict[str, str]:
    """The environment of a script of the tests: it finds the package and the tests, and sums in one order."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)  # whoever starts processes finds a free one
    return environment


def run_pair(command: list[str], folder: Path, timeout: float) -> list[Any]:
    """Run a command that starts a second process by itself; returns what each wrote to ``{rank}.pt`` in the folder."""
    done = subprocess.run(
        command, env=script_environment(), capture_output=True, text=True, timeout=timeout, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def run_ranks(script: Path, folder: Path, ranks: int, *args: str, timeout: float = 300) -> list[Any]:
    """Run a script in so many processes that find each other as torchrun's do; returns what each wrote to ``{rank}.pt`` in the folder.

    The script gets the folder and the arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **script_environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), str(folder), *args]
    started = []
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (folder / f"{rank}.log").open("w")
        started.append((subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT), log))
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process, _ in started):
            failed = any(process.poll() not in (None, 0) for process, _ in started)
            if failed or time.monotonic() > deadline:
                break  # the others may wait for it forever
            time.sleep(0.05)
    finally:
        for process, log in started:
            process.kill()
            process.wait()
            log.close()
    codes = [process.returncode for process, _ in started]
    logs = "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.log').read_text()[-3000:]}" for rank in range(ranks))
    assert codes == [0] * ranks, f"exit codes {codes}\n{logs}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]

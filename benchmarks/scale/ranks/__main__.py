"""Several ranks on CPUs (gloo), one core each: the time of a step with and without ``gather``, and from which size on rows are shared.

    python -m benchmarks.scale.ranks --output benchmarks/results

"one rank" trains alone while the other one waits. Both sides of a ratio stand in one run, in alternating blocks. The traffic that is
counted in the run is that of the arithmetic; the table for more ranks is the same arithmetic, and was not run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scale.ranks.report import markdown
from benchmarks.scale.ranks.traffic import cost
from benchmarks.shared.files import alone, scratch, write_atomically, write_text
from benchmarks.shared.machine import hardware
from lightning_wdefense import Recipe, ThreatModel
from lightning_wdefense._ranks import Ranks
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import ClassTransport
from lightning_wdefense.transport import sharing, sinkhorn

RANKS, BATCH, BLOCK = 2, 64, 4
SIZES = (256, 512, 1024, 2048, 4096)
DIMENSIONS, INTRINSIC = 64, 4


class Counted:
    """Counts the bytes that this rank receives by an all-reduce (as a ring sends them) and an all-gather."""

    def __init__(self) -> None:
        self.bytes = 0
        self._reduce, self._gather = dist.all_reduce, dist.all_gather

    def __enter__(self) -> Counted:
        def reduce(tensor, *args, **kwargs):
            self.bytes += 2 * tensor.numel() * tensor.element_size() * (RANKS - 1) // RANKS
            return self._reduce(tensor, *args, **kwargs)

        def gather(parts, tensor, *args, **kwargs):
            self.bytes += sum(part.numel() * part.element_size() for part in parts[1:])
            return self._gather(parts, tensor, *args, **kwargs)

        dist.all_reduce, dist.all_gather = reduce, gather
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce, dist.all_gather = self._reduce, self._gather


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def step_of(*, together: bool, gather: bool):
    """A training step of class-transport on a batch of this rank's."""
    threat = ThreatModel(eps=8 / 255)
    model = network()
    wrapped = DistributedDataParallel(model) if together else model
    recipe = Recipe.named("class-transport", threat, attack=PGD(threat, steps=3), gather=gather)
    defense, optimizer = recipe.bind(wrapped), torch.optim.SGD(model.parameters(), 0.01)
    if not together:  # the other rank takes no part
        Ranks.current = classmethod(lambda cls: cls())
    generator = torch.Generator().manual_seed(dist.get_rank())
    inputs, labels = torch.rand(BATCH, 3, 32, 32, generator=generator), torch.arange(BATCH) % 10

    def run() -> None:
        optimizer.zero_grad()
        defense(inputs, labels).loss.backward()
        optimizer.step()

    return run


def timed(run, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def steps(blocks: int) -> dict[str, list[float]]:
    """Seconds of the steps of rank 0: alone, on two ranks, and on two ranks with gathered samples."""
    current = Ranks.__dict__["current"]
    kinds = {"one rank": (False, False), "two ranks": (True, False), "two ranks, gather": (True, True)}
    runs = {}
    for kind, (together, gather) in kinds.items():
        runs[kind] = step_of(together=together, gather=gather)
        Ranks.current = current
    found = defaultdict(list)
    for block in range(blocks + 1):
        for kind, (together, _) in kinds.items():
            dist.barrier()
            if together or dist.get_rank() == 0:
                if not together:
                    Ranks.current = classmethod(lambda cls: cls())
                seconds = timed(runs[kind], BLOCK)
                Ranks.current = current
                found[kind] += seconds if block else []  # the first block warms up
            dist.barrier()
    return dict(found)


def rows(blocks: int, sizes: Sequence[int]) -> dict[str, dict[str, object]]:
    """Seconds of class transport with its gradient between clouds of all ranks: whole on each rank, and with shared rows."""
    ranks, found = Ranks.current(), {}
    for n in sizes:
        generator = torch.Generator().manual_seed(0)
        # In few dimensions within many, as features are.
        basis = torch.randn(INTRINSIC, DIMENSIONS, generator=generator)
        clean = torch.randn(n, INTRINSIC, generator=generator) @ basis
        moved = (clean + 0.5 * torch.randn(n, INTRINSIC, generator=generator) @ basis).requires_grad_()
        labels = torch.arange(n) % 10
        discrepancy, parts = ClassTransport(), [n // RANKS] * RANKS

        def run(discrepancy=discrepancy, clean=clean, moved=moved, labels=labels, parts=parts) -> None:
            with sharing.rows_shared(ranks, parts):
                torch.autograd.grad(discrepancy(clean, moved, labels), moved)

        seconds: dict[str, list[float]] = {"whole": [], "shared": []}
        for block in range(blocks + 1):
            for kind, least in (("whole", 2**62), ("shared", 1)):
                sharing.SHARED = least
                dist.barrier()
                seconds[kind] += timed(run, 2) if block else timed(run, 1)[:0]
        sharing.SHARED = 1
        with sharing.rows_shared(ranks, parts), Counted() as counted, torch.no_grad():
            n_iter = sinkhorn(clean, moved, relative_blur=0.1).n_iter
        found[str(n)] = {**seconds, "n_iter": n_iter, "bytes": counted.bytes}
    return found


def work(folder: Path, blocks: int, sizes: Sequence[int]) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    measured = {"steps": steps(blocks), "rows": rows(blocks, sizes)}
    if dist.get_rank() == 0:
        write_atomically(folder / "measured.json", measured)
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, argv: Sequence[str]) -> dict:
    """Start the ranks and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.scale.ranks", *argv, "--worker", str(folder)]
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(RANKS)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"The ranks ended with exit codes {codes}.")
    return json.loads((folder / "measured.json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of points of all ranks")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        work(options.worker, options.blocks, options.sizes)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "ranks_cpu"
    words = ["--blocks", str(options.blocks), "--sizes", *map(str, options.sizes)]
    with alone(stem.with_suffix(".json")), scratch(options.output) as folder:
        torch.set_num_threads(1)
        measured = launch(folder, words)
        result = {"hardware": hardware("cpu"), "torch": torch.__version__, **measured}
        result["paper"] = {
            f"{ranks} x 128 x {features}": cost(ranks, 128, features, 40)._asdict()
            for features in (512,)
            for ranks in (2, 8, 64, 1024)
        }
        write_atomically(stem.with_suffix(".json"), result)
    text = markdown(result, f"python -m benchmarks.scale.ranks --blocks {options.blocks}")
    write_text(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()

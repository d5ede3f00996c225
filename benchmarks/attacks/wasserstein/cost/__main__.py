"""What a step of the Wasserstein attack costs: time against a step of PGD, and memory by pixels and neighbourhood.

    python -m benchmarks.attacks.wasserstein.cost --data folder --output benchmarks/results   # holds mnist.npz
    python -m benchmarks.attacks.wasserstein.cost --quick --output DIR                       # only to see that it runs

Times are of whole attacks by their number of steps, in alternating blocks of one run, on the network for MNIST (its images, most of whose
pixels are empty) and on a PreAct ResNet-18 (32 x 32 in colour, noise, so that every pixel has mass). Memory is by how
much a fresh process grows at most during an attack (Linux only).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.shared.data import load
from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.models import NETWORKS
from benchmarks.shared.protocol import Protocol
from benchmarks.shared.statistics import ratio_interval
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD, Attack, WassersteinAttack

STEPS = 5
METHODS = ("projected", "frank-wolfe")
SIZES, NEIGHBOURHOODS, BATCH = (64, 128), (3, 5, 9), 4


def wasserstein(method: str, steps: int, neighbourhood: int = 5) -> Attack:
    threat = ThreatModel(norm="wasserstein", eps=0.2)
    return WassersteinAttack(threat, steps=steps, methods=method, restarts=1, neighbourhood=neighbourhood)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def times(name: str, x: torch.Tensor, y: torch.Tensor, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval().requires_grad_(False)
    attacks = {"pgd": PGD(ThreatModel(eps=0.1), steps=STEPS)} | {each: wasserstein(each, STEPS) for each in METHODS}
    found: dict[str, list[float]] = {each: [] for each in attacks}
    for repeat in range(repeats + 1):
        for each, attack in attacks.items():
            taken = seconds(lambda attack=attack: attack(network, x, y)) / STEPS
            if repeat:  # the first warms up
                found[each].append(taken)
    medians = {each: statistics.median(values) for each, values in found.items()}
    print(name, {each: f"{1000 * value:.1f} ms a step" for each, value in medians.items()}, flush=True)
    return {
        each: {
            "ms": 1000 * medians[each],
            "ratio": medians[each] / medians["pgd"],
            "interval": ratio_interval(found[each], found["pgd"]),
        }
        for each in attacks
    }


def peak(method: str, size: int, neighbourhood: int) -> float:
    """Bytes by which a fresh process grows at most while it attacks a batch of noise."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.attacks.wasserstein.cost",
        "--memory",
        method,
        str(size),
        str(neighbourhood),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def attack_once(method: str, size: int, neighbourhood: int) -> None:
    torch.set_num_threads(1)
    x = torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
    attack, y = wasserstein(method, 3, neighbourhood), torch.arange(BATCH) % 10
    attack(network, x[:, :, :9, :9], y)  # what is loaded at the first call is not the attack's
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    attack(network, x, y)
    print(1024 * (kilobytes("VmHWM") - before))


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory(sizes: Sequence[int], neighbourhoods: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        for neighbourhood in neighbourhoods:
            for method in METHODS:
                extra = peak(method, size, neighbourhood)
                entries = BATCH * 3 * size**2 * neighbourhood**2
                rows.append(
                    {"method": method, "size": size, "neighbourhood": neighbourhood, "MiB": extra / 2**20,
                     "bytes an entry": extra / entries}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# What a step of the Wasserstein attack costs",
        "",
        f"`{result['command']}`, on {result['hardware']}, torch {result['torch']}. Medians of {result['repeats']} attacks of {STEPS} steps each, ratios to a step of PGD with 95% "
        "bootstrap intervals; neighbourhood 5 x 5.",
        "",
        "| network | attack | ms a step | ratio to PGD |",
        "|---|---|---|---|",
    ]
    for network, rows in result["times"].items():
        for name, row in rows.items():
            low, high = row["interval"]
            lines.append(f"| {network} | {name} | {row['ms']:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    lines += [
        "",
        f"By how much the process grows at most, {BATCH} images in colour of noise: if it grows as pixels x neighbourhood, the bytes an entry are the same.",
        "",
        "| attack | image | neighbourhood | MiB | bytes an entry (pixel, channel and neighbour) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['size']} x {row['size']} | {row['neighbourhood']} x {row['neighbourhood']} | {row['MiB']:.0f} | {row['bytes an entry']:.0f} |"
        for row in result["memory"]
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks.wasserstein.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz; without it the digits serve")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        method, size, neighbourhood = options.memory
        return attack_once(method, int(size), int(neighbourhood))
    torch.set_num_threads(1)
    dataset = "mnist" if options.data else "digits"
    x, y = load(Protocol(dataset, 0, 100, 128, 0.0, 1, 128), options.data).test
    few, repeats = (1, 1) if options.quick else (None, options.repeats)
    noise = torch.rand(1 if options.quick else 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    command = (
        "python -m benchmarks.attacks.wasserstein.cost"
        + (" --data folder" if options.data else "")
        + f" --repeats {repeats}"
    )
    result = {
        "command": command,
        "hardware": hardware("cpu"),
        "torch": torch.__version__,
        "repeats": repeats,
        "times": {
            dataset: times(dataset, x, y, repeats),
            "ResNet-18": times("cifar10", noise, torch.arange(len(noise)) % 10, repeats),
        },
        "memory": memory(SIZES[:few], NEIGHBOURHOODS[:few]),
    }
    stem = options.output / "wasserstein_cost_cpu"
    write_atomically(stem.with_suffix(".json"), result)
    write_text(stem.with_suffix(".md"), text := markdown(result))
    print(text)


if __name__ == "__main__":
    main()

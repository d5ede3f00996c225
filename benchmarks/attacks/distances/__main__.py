"""FMN against adv-lib's and Foolbox's at the same number of passes, and the accuracy curve of one run against AutoAttack's.

    python -m benchmarks.distributional train --data DIR --models standard "pgd-at 1.5" --seeds 1
    python -m benchmarks.attacks.distances --data DIR

The models are those that the first command trains: MNIST, undefended and PGD training at an L2 radius of 1.5. A step is a forward and a
backward pass; ours has fewer of them, because it ends with forward passes. adv-lib is not a dependency: ``pip install --no-deps adv-lib``;
without it its rows are left out. Times are CPU seconds of the process, in one run on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.distances.peers import adv_lib, foolbox
from benchmarks.distributional.training import L2Protocol, stored_networks
from benchmarks.shared.data import Images, load
from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import command, hardware
from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import DDN, FMN, AutoAttack
from lightning_wdefense.metrics import distributional_accuracy

PASSES = 100
"""Forward and backward passes of each attack."""
TIGHTENING = 12
OURS = PASSES - TIGHTENING // 2 - 1
"""Steps of ours: its first check, its last check and the forward passes at the end are as many passes as 7 steps."""
TARGETS = 4
"""Of the run from which the curve follows: one more run of FMN at each of so many classes."""
EPSILONS = {"linf": (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2), "l2": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return run(), time.process_time() - began


def compare(model: nn.Module, images: Images, norm: str) -> dict[str, Any]:
    """Median and mean distance of each attack over the images that are right, how many it fails on, and its time."""
    x, y = images
    threat = ThreatModel(norm=norm)
    with torch.no_grad():
        right = model(x).argmax(1) == y

    def ours(attack: type) -> Callable[[], Tensor]:
        return lambda: attack(threat, steps=OURS, tightening=TIGHTENING)(model, x, y).inputs

    sides: dict[str, Callable[[], Tensor]] = {"FMN, ours": ours(FMN)}
    if norm == "l2":
        sides["DDN, ours"] = ours(DDN)
    try:
        for alpha in (1.0, 10.0):
            run = adv_lib(alpha)
            sides[f"FMN, adv-lib, first step {alpha:g}"] = lambda run=run: run(model, x, y, threat, PASSES)
    except ImportError:
        print("adv-lib is not installed: its rows are left out", flush=True)
    sides["FMN, Foolbox"] = lambda: foolbox(model, x, y, threat, PASSES)
    found = {}
    for name, run in sides.items():
        moved, seconds = timed(run)
        with torch.no_grad():
            fooled = (model(moved).argmax(1) != y)[right]
        lengths = threat.ball.length(moved - x)[right].where(fooled, torch.inf)
        found[name] = {
            "median": round(float(lengths.median()), 4),
            "mean_of_found": round(float(lengths[fooled].mean()), 4),
            "failed": int((~fooled).sum()),
            "cpu_s": round(seconds, 2),
        }
    return found


def curve(model: nn.Module, images: Images, norm: str) -> dict[str, Any]:
    """Accuracy at eight radii from one run of FMN, and from AutoAttack at each."""
    batch, threat = [tuple(images)], ThreatModel(norm=norm, eps=EPSILONS[norm][-1])
    found, seconds = timed(lambda: FMN(threat, targets=TARGETS)(model, *images).distances)
    ours = distributional_accuracy(found, EPSILONS[norm], torch.inf).accuracies
    result, slow = timed(
        lambda: evaluate(
            model, batch, threat, {"aa": AutoAttack(threat)}, epsilons=EPSILONS[norm], features=None, progress=False
        )
    )
    theirs = result.curve.accuracies[1:]
    return {
        "epsilons": EPSILONS[norm],
        "fmn": [round(value, 4) for value in ours.tolist()],
        "autoattack": [round(value, 4) for value in theirs.tolist()],
        "largest_difference": round(float((ours - theirs).abs().max()), 4),
        "fmn_cpu_s": round(seconds, 2),
        "autoattack_cpu_s": round(slow, 2),
        "ratio": round(seconds / slow, 4),
    }


def markdown(results: dict[str, Any], head: str) -> str:
    lines = [
        head,
        "",
        "| model | norm | attack | median | mean of found | failed | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        for side, found in row["sides"].items():
            values = found["median"], found["mean_of_found"], found["failed"], found["cpu_s"]
            lines.append(f"| {' | '.join([*name.split(', '), side, *map(str, values)])} |")
    for name, row in results.items():
        if "curve" in row:
            it = row["curve"]
            lines += [
                "",
                f"**{name}**: per cent left, FMN with {TARGETS} targets once, and AutoAttack at each radius.",
                "",
            ]
            lines += [f"| | {' | '.join(f'eps {eps:g}' for eps in it['epsilons'])} |", "|---" * 9 + "|"]
            lines += [
                f"| {side} | {' | '.join(f'{100 * v:.1f}' for v in it[side])} |" for side in ("fmn", "autoattack")
            ]
            lines += ["", f"Largest difference {100 * it['largest_difference']:.1f} points; CPU time {it['fmn_cpu_s']} s and {it['autoattack_cpu_s']} s, ratio {it['ratio']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks.distances", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/distributional"), help="trained weights")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    protocol = L2Protocol("mnist", train=100, validation=1000, test=options.images, eps=1.5, epochs=1, batch_size=128)
    images = load(protocol, options.data).test
    results: dict[str, Any] = {}
    for label, _, network in stored_networks(options.work, ["standard", "pgd-at 1.5"], 1):
        for norm in ("linf", "l2", "l1"):
            row: dict[str, Any] = {"sides": compare(network, images, norm)}
            if norm in EPSILONS:
                row["curve"] = curve(network, images, norm)
            results[f"{label}, {norm}"] = row
            print(label, norm, row, flush=True)
    if not results:
        raise SystemExit(f"There are no trained models in {options.work}: run benchmarks.distributional train first.")
    ratios = [row["curve"]["ratio"] for row in results.values() if "curve" in row]
    head = (
        f"# Distances to the decision boundary\n\n`{command('attacks.distances', sys.argv[1:])}`, on {hardware('cpu')}, torch "
        f"{torch.__version__}. {options.images} MNIST test images; distances of those that are right. Each attack has {PASSES} forward and "
        f"backward passes. FMN's one run takes {100 * statistics.median(ratios):.1f}% of AutoAttack's time at eight radii (median of {len(ratios)})."
    )
    write_text(options.output / "distances_mnist.md", markdown(results, head))
    write_atomically(options.output / "distances_mnist.json", {"results": results, "hardware": hardware("cpu")})


if __name__ == "__main__":
    main()

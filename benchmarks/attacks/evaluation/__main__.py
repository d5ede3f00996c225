"""What `evaluate` costs beside its attacks, and what is left of it when it is killed.

    python -m benchmarks.attacks.evaluation --data DIR

Both sides attack the same batches with the same noise: `evaluate`, with its metrics, samples and the file of finished batches, and a bare loop
that calls the attacks and counts. They take turns, and the ratio is that of the medians. Then a process that evaluates is killed half-way
(SIGKILL) and started again; its result is compared with that of an undisturbed one to the bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.autoattack.models import CASES, model_of
from benchmarks.attacks.evaluation.killed import killed_and_resumed
from benchmarks.attacks.evaluation.report import report
from benchmarks.shared.data import load
from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import command, hardware
from benchmarks.shared.protocol import PROTOCOLS
from benchmarks.shared.statistics import ratio_interval
from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import APGD, PGD, Attack

Batches = list[tuple[Tensor, Tensor]]


def attacks_of(threat: ThreatModel, quick: bool) -> dict[str, dict[str, Attack]]:
    """What is attacked with: one cheap attack, and the two that a claim begins with."""
    steps = 2 if quick else 40
    both = {"apgd-ce": APGD(threat, steps=steps, loss="ce"), "apgd-t": APGD(threat, steps=steps, loss="dlr-targeted")}
    return {f"PGD, {steps} steps": {"pgd": PGD(threat, steps=steps)}, f"APGD-CE and APGD-T, {steps} steps": both}


def bare(model: nn.Module, batches: Batches, attacks: Mapping[str, Attack]) -> float:
    """Robust accuracy by the attacks alone: the first on all images, each other one on those that are left."""
    kept = 0
    for x, y in batches:
        with torch.no_grad():
            left = model(x).argmax(1) == y
        for place, attack in enumerate(attacks.values()):
            index = torch.arange(len(y)) if place == 0 else left.nonzero().squeeze(1)
            if len(index):
                adversarial = attack(model, x[index], y[index])
                with torch.no_grad():
                    left[index] &= model(adversarial).argmax(1) == y[index]
        kept += int(left.sum())
    return kept / sum(len(y) for _, y in batches)


def timed(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(
    model: nn.Module, batches: Batches, threat: ThreatModel, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """CPU seconds of every side, in turns."""
    rows = []
    for name, attacks in attacks_of(threat, options.quick).items():
        seconds: dict[str, list[float]] = {}
        for turn in range(options.turns + 1):
            with tempfile.TemporaryDirectory() as scratch:
                whole = partial(evaluate, model, batches, threat, attacks, progress=False)
                sides = {
                    "bare": partial(bare, model, batches, attacks),
                    "accuracies": partial(whole, features=None),
                    "and a file": partial(whole, features=None, resume=Path(scratch) / "a.pt"),
                    "and the shift": partial(whole, resume=Path(scratch) / "b.pt"),
                }
                for side, run in sides.items():
                    found = timed(run)
                    if turn:  # the first one warms up
                        seconds.setdefault(side, []).append(found)
        middle = {side: round(statistics.median(found), 3) for side, found in seconds.items()}
        ratios = {side: round(middle[side] / middle["bare"], 4) for side in middle}
        intervals = {side: ratio_interval(found, seconds["bare"]) for side, found in seconds.items()}
        rows.append({"attacks": name, "cpu_s": middle, "ratio": ratios, "interval": intervals, "turns": options.turns})
        print(name, middle, ratios, flush=True)
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks.evaluation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="folder of mnist.npz; scikit-learn's digits if absent")
    parser.add_argument("--work", type=Path, help="folder in which the trained model is kept")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5, help="how often each side runs")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.quick:
        options.images, options.batch_size, options.turns = 40, 10, 1
    return options


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    name = "MNIST, undefended, L-inf 0.1" if options.data else "digits, pgd-at, L2 0.8"
    splits = load(PROTOCOLS[CASES[name].dataset], options.data)
    threat = CASES[name].threat
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = model_of(name, splits, options.work or folder, 1)
        x, y = splits.test.first(options.images)
        batches = list(zip(x.split(options.batch_size), y.split(options.batch_size), strict=True))
        rows = measured(model, batches, threat, options)
        killed = killed_and_resumed(
            model, CASES[name].dataset, batches, threat, folder, steps=5 if options.quick else 40
        )
    result = {
        "environment": {
            "command": command("attacks.evaluation", sys.argv[1:]),
            "hardware": hardware("cpu"),
            "torch": torch.__version__,
        },
        "model": name,
        "images": len(y),
        "batches": len(batches),
        "cost": rows,
        "killed": killed,
    }
    write_atomically(options.output / "evaluation_cpu.json", result, indent=2)
    write_text(options.output / "evaluation_cpu.md", report(result))
    print(report(result))


if __name__ == "__main__":
    main()

"""Recipes against a distributional adversary: one Wasserstein budget for all images, L2, MNIST.

    python -m benchmarks.distributional train --data DIR --seeds 5
    python -m benchmarks.distributional measure --data DIR --seeds 5

The first trains, the second measures what has been trained. Both can be stopped, or killed, and go on where they were.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.distributional.measuring import STEPS, against_w_pgd, measure
from benchmarks.distributional.report import FRONTIER, certified, markdown, plot, summary
from benchmarks.distributional.training import MODELS, L2Protocol, place, stored_networks, train_all
from benchmarks.shared.data import Images, load
from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import command, hardware

AGAINST_W_PGD = ("standard", "pgd-at 1.5")
CERTIFIED = 3
"""Seeds whose smoothed classifiers are certified."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributional",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("train", "measure"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/distributional"), help="trained weights")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--test", type=int, default=500, help="test images that are attacked")
    parser.add_argument("--clean", type=int, default=10_000, help="test images for the clean accuracy")
    parser.add_argument(
        "--certified", type=int, default=100, help="test images with certified radii, of the first three seeds"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    protocol = L2Protocol(
        "mnist", train=options.train, validation=1000, test=options.clean, eps=1.5, epochs=options.epochs, batch_size=128,
        schedule="one-cycle", lr=1e-2, warmup_epochs=options.epochs / 2,
    )  # fmt: skip
    splits = load(protocol, options.data)
    if options.stage == "train":
        train_all(options.work, options.models, options.seeds, protocol, splits.train)
    else:
        report(options, protocol, splits.test, sys.argv[1:] if arguments is None else arguments)


def report(options: argparse.Namespace, protocol: L2Protocol, images: Images, argv: Sequence[str]) -> None:
    """Measure all trained models, and write the tables and the picture."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    attacked: dict[str, Any] = {}
    attacked_images = images.first(options.test)
    for label, seed, network in stored_networks(options.work, options.models, options.seeds):
        path, certified_images = place(options.work, label, seed), options.certified if seed < CERTIFIED else 0
        runs.setdefault(label, {})[seed] = measure(network, attacked_images, images, certified_images, path)
        if seed == 0 and label in AGAINST_W_PGD:
            attacked[label] = against_w_pgd(network, attacked_images, path)
        print(f"{label}, seed {seed}: clean {runs[label][seed]['clean']:.3f}", flush=True)
    rows, sure = summary(runs), certified(runs)
    head = (
        f"# An adversary with one Wasserstein budget for all images\n\n`{command('distributional', argv)}`, on {hardware('cpu')}, torch "
        f"{torch.__version__}. MNIST, {protocol.train} training images, {protocol.epochs} epochs, one-cycle to {protocol.lr:g}; clean "
        f"accuracy on {len(images.y)} test images, all else on {options.test} of them. Per cent, means over seeds ± half a 95% t-interval, "
        "differences paired by seed; a difference whose interval contains 0 is a tie, and with so many cells some will not be one by chance. "
        "`eps`: each image moves by at most that L2 distance. `W_p`: the distribution moves by at most that distance. Accuracies are upper "
        f"bounds, from distances that FMN and DDN found ({STEPS} steps each). At the same clean accuracy: interpolated, seed by seed, "
        f"between {', '.join(FRONTIER)}, without those that another one beats in both; below the lowest clean accuracy of these, the difference is to that one."
    )
    write_text(options.output / "distributional_mnist.md", markdown(rows, sure, attacked, head))
    plain = {
        "rows": rows,
        "certified": sure,
        "w-pgd": attacked,
        "hardware": hardware("cpu"),
        "torch": torch.__version__,
    }
    write_atomically(options.output / "distributional_mnist.json", plain)
    plot(runs, options.output / "distributional_mnist.png")


if __name__ == "__main__":
    main()

"""Recipes against a distributional adversary: one Wasserstein budget for all images, L2, MNIST.

python -m benchmarks.distributional train --data folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.distributional.training import MODELS, L2Protocol, train_all
from benchmarks.shared.data import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributional",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("train",))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/distributional"), help="trained weights")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--test", type=int, default=500, help="test images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    protocol = L2Protocol(
        "mnist", train=options.train, validation=1000, test=options.test, eps=1.5, epochs=options.epochs, batch_size=128,
        schedule="one-cycle", lr=1e-2, warmup_epochs=options.epochs / 2,
    )  # fmt: skip
    splits = load(protocol, options.data)
    train_all(options.work, options.models, options.seeds, protocol, splits.train)


if __name__ == "__main__":
    main()

"""How far a critic's W_1 is from the truth, over learning rates, steps a batch and penalties: ours, and plain WGAN-GP.

    python -m benchmarks.critic --output benchmarks/results
    python -m benchmarks.critic --accuracy-seeds 3                              # robust accuracy as well
    python -m benchmarks.critic --accuracy-seeds 3 --dataset mnist --data DIR   # of the central decade of learning rates

Two Gaussians of unit variance, one moved by a vector of length 1: ``W_1`` is 1 in any dimension. Every batch is fresh. Each critic sees the
same number of batches, and its figure is what it says of the last quarter of them before it learns from each. The peer is the critic of Gulrajani et
al. (2017) as published: ReLU, a two-sided penalty of 10, Adam with betas (0, 0.9) and a constant rate, 5 steps a batch; its figure is the gap.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.critic.accuracy import measure as accuracy
from benchmarks.critic.accuracy import report as accuracy_report
from benchmarks.critic.distance import measure as distance
from benchmarks.critic.distance import report as distance_report
from benchmarks.shared.files import alone, read, write_text
from benchmarks.shared.machine import hardware


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.critic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--accuracy-seeds", type=int, default=0, help="runs of each setting of recipe critic")
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits", help="of the accuracy")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz; digits need none")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "critic_sensitivity"
    beside, machine = options.output / "critic_accuracy.json", hardware("cpu")
    with alone(path := stem.with_suffix(".json")):
        measured_on, results = distance.complete(path, options.seeds, machine)
        if options.accuracy_seeds:
            accuracy.measure(beside, options.accuracy_seeds, options.dataset, options.data, machine)
    accuracies = read(beside)
    distance_report.plot(results, accuracies, stem.with_suffix(".png"))
    text = distance_report.markdown(results, options.seeds, measured_on)
    if accuracies:
        text += "\n" + accuracy_report.markdown(accuracies)
    write_text(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()

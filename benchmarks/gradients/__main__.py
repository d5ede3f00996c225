"""Is the gradient of a Wasserstein distance steadier and more meaningful than that of L2? Measured, where pairs are known and where they are not.

    python -m benchmarks.gradients --output benchmarks/results

**Known pairs**, as in adversarial training: penultimate features of a small CNN on digits, clean and attacked (PGD), at stages of undefended and
of adversarial training. **Fresh samples**: two clouds without pairs, of which one is shifted by a known vector: Gaussians of unit variance, and clean
features of two disjoint sets of images (in units of a typical coordinate). Paired L2 then pairs at random.

The losses, at the settings of the recipes: paired L2 (``alp``), the Sinkhorn divergence (p = 2 and p = 1), half the squared sliced Wasserstein distance,
and the gap of a critic, which has learned from ``UPDATES`` earlier batches and then from the batch itself, as in recipe ``critic``; for pairs also one that
is told the classes.

What counts, fixed before anything was compared:

* *steadier*: the mean cosine between gradients of different minibatches is higher than paired L2's;
* *more meaningful*: so is the mean cosine between a minibatch's gradient and the true one. For pairs that is the same loss on all images
  at once (for the critic, another critic of other weights that has learned twice as long; for the sliced distance 16 times as many directions, so that
  what each loss has at random counts against it); for fresh samples it is the shift, the same for every loss.

Both are taken of the gradient in the *points* (a sample's gradient in two minibatches that have only that sample in common; for fresh samples, against two fresh
batches of the other cloud) and in the *parameters* (of the CNN; of the affine map ``z A + b`` that made the moving cloud), between disjoint minibatches.
A loss is better or worse in a setting if the 95% t-interval of its difference to paired L2, paired over seeds, excludes 0; otherwise they are not separated. Every setting
counts, none is left out. Where pairs are known, the gradient of paired L2 in a sample does not depend on the rest of the batch, so that on points it has 1
by construction: the verdict there is that of the parameters. No correction for the number of comparisons: of 100 without a difference, 5 would seem to have one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gradients.losses import BY_CLASS, PAIRED, TRANSPORT
from benchmarks.gradients.measures import (
    Measures,
    Pairs,
    feature_clouds,
    fresh_samples,
    gaussians,
    known_pairs,
    trained_stages,
    true_gradient,
)
from benchmarks.gradients.plot import plot
from benchmarks.gradients.report import Results, markdown
from benchmarks.shared.data import load
from benchmarks.shared.files import alone, read, write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.protocol import PROTOCOLS

EPOCHS = (4, 12)
SIZES = (16, 64)
DIMENSIONS = (2, 16, 128)
DISTANCES = (0.25, 1.0, 4.0, 16.0)
UPDATES, PROBES, BATCHES = 200, 3, 16
Job = tuple[str, Callable[[], Measures]]


def jobs(stages: dict[str, Pairs], images: torch.Tensor, seed: int) -> Iterator[Job]:
    """The name of each measurement, ``kind|setting|batch size|loss``, and how to make it."""
    for (stage, pairs), name in itertools.product(stages.items(), (PAIRED, *TRANSPORT, BY_CLASS)):
        truth = true_gradient(pairs, name, seed, UPDATES)
        for size in SIZES:
            key = f"known pairs|{stage}|{size}|{name}"
            yield key, partial(known_pairs, pairs, truth, name, size, seed, UPDATES, BATCHES)
    clouds = next(iter(stages.values()))
    for distance, size, name in itertools.product(DISTANCES, SIZES, (PAIRED, *TRANSPORT)):
        sources = {f"Gaussians {dim}-D": (gaussians(dim, seed), gaussians(dim, seed + 500)) for dim in DIMENSIONS}
        sources["features 64-D"] = feature_clouds(clouds, images, seed)
        for source, (learn, measure) in sources.items():
            key = f"fresh samples|{source}, shift {distance:g}|{size}|{name}"
            yield key, partial(fresh_samples, learn, measure, name, distance, size, seed, UPDATES, PROBES)


def complete(path: Path, seeds: int) -> tuple[str, Results]:
    """Measure what is not stored yet, seed by seed; the machine and all results."""
    stored = read(path)
    machine, results = stored.get("hardware", hardware("cpu")), stored.get("results", {})  # no times: another may go on
    protocol = PROTOCOLS["digits"]
    splits = load(protocol, None)
    images = torch.cat([part.x for part in splits])
    for seed in range(seeds):
        if results and all(str(seed) in cell for cell in results.values()):
            continue
        start = time.perf_counter()
        stages = trained_stages(splits, protocol, seed, EPOCHS)
        for key, measure in jobs(stages, images, seed):
            values = {name: round(value, 5) for name, value in measure().items()}
            results.setdefault(key, {})[str(seed)] = values
        write_atomically(path, {"hardware": machine, "results": results})
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return machine, results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "gradients"
    with alone(path := stem.with_suffix(".json")):
        machine, results = complete(path, options.seeds)
    plot(results, stem.with_suffix(".png"))
    text = markdown(results, machine)
    write_text(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()

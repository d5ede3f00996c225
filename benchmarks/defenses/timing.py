"""What a training step of each recipe costs: short blocks of all in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.defenses.runs import Bench, hardware
from benchmarks.shared.files import claimed, read, short_hash, write_atomically
from benchmarks.shared.models import Classifier
from benchmarks.shared.statistics import bootstrap_median
from benchmarks.shared.training import SETTLING, classifier, steps
from benchmarks.shared.variants import Variant

REFERENCE = "pgd-at"
SEED = 0


def timing_path(bench: Bench) -> Path:
    return bench.work / f"{bench.protocol.dataset}-timing-{short_hash(asdict(bench.protocol))}.json"


def time_in_turns(bench: Bench, variants: list[Variant], rounds: int, block: int) -> None:
    """Store the median step of each variant and its ratio to the first one's, the median over rounds."""
    everyone = list({variant.key: variant for variant in variants}.values())
    modules = {variant.key: _trained(bench, variant) for variant in everyone}
    # The process's own seconds are free of what other processes take; on a GPU only the wall's mean anything.
    clock = "wall" if bench.protocol.device == "cuda" else "cpu"
    seconds: dict[str, list[list[float]]] = {variant.key: [] for variant in everyone}
    for turn in range(rounds):
        for variant in everyone:
            timed = steps(variant, bench.protocol, modules[variant.key], bench.splits.train, block, seed=turn)
            seconds[variant.key].append(getattr(timed, clock)[SETTLING:])
        print(f"timing: round {turn + 1} of {rounds}", flush=True)
    medians = {key: [statistics.median(block) for block in blocks] for key, blocks in seconds.items()}
    entries = {}
    for variant in everyone:
        ratios = [ours / theirs for ours, theirs in zip(medians[variant.key], medians[everyone[0].key], strict=True)]
        entries[variant.key] = {
            "label": variant.label,
            "clock": clock,
            "step_ms": round(1e3 * statistics.median(chain.from_iterable(seconds[variant.key])), 3),
            "ratio": round(statistics.median(ratios), 4),
            "interval_95": [round(end, 4) for end in bootstrap_median(ratios)],
            "rounds": rounds,
            "steps": rounds * (block - SETTLING),
            "hardware": hardware(bench.protocol),
        }
    path = timing_path(bench)
    with claimed(path.with_suffix(".lock"), wait=True):
        write_atomically(path, read(path) | entries)


def timings(bench: Bench) -> dict[str, dict[str, Any]]:
    """What was stored, by the variants' keys."""
    return read(timing_path(bench))


def _trained(bench: Bench, variant: Variant) -> Classifier:
    """The trained model if there is one: what transport costs depends on the features."""
    weights = bench.run(variant, SEED).weights()
    if weights is not None:
        return classifier(weights, bench.protocol).train()
    L.seed_everything(SEED, verbose=False)
    return Classifier(bench.protocol)

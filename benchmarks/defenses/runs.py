"""The stages of a run: training, then attack after attack, each stored when it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

import lightning_wdefense
from benchmarks.defenses.store import Run
from benchmarks.shared.accuracy import left, right
from benchmarks.shared.data import Splits
from benchmarks.shared.machine import processor
from benchmarks.shared.protocol import ALWAYS, CLEAN, STAGES, Protocol
from benchmarks.shared.training import classifier, train
from benchmarks.shared.variants import Variant, settings

Weights = dict[str, Tensor] | None


class Bench(NamedTuple):
    """What all runs share."""

    protocol: Protocol
    splits: Splits
    work: Path

    def run(self, variant: Variant, seed: int) -> Run:
        return Run(self.work, {"protocol": asdict(self.protocol), **variant.identity, "seed": seed})


def hardware(protocol: Protocol) -> dict[str, Any]:
    """Where a run ran, without the machine's name."""
    return {
        "processor": processor(protocol.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "lightning_wdefense": lightning_wdefense.__version__,
    }


def describe(hardware: dict[str, Any]) -> str:
    packages = ", ".join(
        f"{name.replace('_', '-')} {hardware[name]}" for name in ("torch", "lightning", "lightning_wdefense")
    )
    return f"{hardware['processor']}, {hardware['threads']} of {hardware['cores']} cores, {packages}"


def encode(mask: Tensor) -> str:
    return "".join("1" if value else "0" for value in mask.tolist())


def decode(mask: str) -> Tensor:
    return torch.tensor([value == "1" for value in mask])


def measured(mask: Tensor, seconds: float) -> dict[str, Any]:
    return {"accuracy": round(float(mask.float().mean()), 6), "seconds": round(seconds, 2), "correct": encode(mask)}


def work_on(bench: Bench, variant: Variant, seed: int, stages: Sequence[str], tune_samples: int | None) -> bool:
    """Do what is not done of a run; ``False`` if another process has it."""
    run = bench.run(variant, seed)
    with run.claim() as ours:
        if not ours:
            return False
        weights = None
        if _unfinished(run, stages, tune_samples) and (weights := run.weights()) is None:
            weights = _train(bench, run, variant, seed)
        if tune_samples is None and run.record.get("label") != variant.label:
            run.store(label=variant.label)  # a candidate of the tuning has none, and no row in the table
        if "diverged" in run.record["training"]:
            return True
        if tune_samples is None:
            _attack(bench, run, weights, stages)
        else:
            _tune(bench, run, weights, tune_samples)
    return True


def _train(bench: Bench, run: Run, variant: Variant, seed: int) -> Weights:
    """Train and store; the weights of the chosen epoch, if it did not diverge."""
    images = bench.splits
    done, weights = train(variant, bench.protocol, images.train, images.validation, seed, run.folder)
    record, anew = run.record, {}
    if done.get("validation_pgd") != record.get("training", done).get("validation_pgd"):
        print(f"{title(run)}: trains differently here than where its record comes from, so all is measured anew.")
        anew = {key: {} for key in ("test", "tuning") if key in record}
    run.store_trained(weights, training=done, hardware=hardware(bench.protocol), **anew)
    said = done.get("diverged") or f"{done['wall_s']:.0f} s, validation {done['validation_pgd']}"
    print(f"{title(run)}: {said}", flush=True)
    return weights


def _unfinished(run: Run, stages: Sequence[str], tune_samples: int | None) -> bool:
    """Whether something is still to be done that needs the weights, or their training."""
    record = run.record
    if "diverged" in record.get("training", {}):
        return False
    if tune_samples is not None:
        return str(tune_samples) not in record.get("tuning", {})
    return not {CLEAN, *stages} <= record.get("test", {}).keys()


def _attack(bench: Bench, run: Run, weights: Weights, stages: Sequence[str]) -> None:
    """Attack the test images."""
    results = run.record.get("test", {})
    missing = [stage for stage in (CLEAN, *stages) if stage not in results]
    if missing:
        model = classifier(weights, bench.protocol)
    for stage in missing:
        began = time.perf_counter()
        if stage == CLEAN:
            mask = right(model, bench.splits.test, bench.protocol.device)
        else:
            open_ = decode(results[STAGES[stage]]["correct"])
            mask = left(model, bench.protocol.attack(stage), bench.splits.test, open_, bench.protocol.device)
        results[stage] = measured(mask, time.perf_counter() - began)
        run.store(test=results)
        print(f"  {title(run)}, {stage}: {results[stage]['accuracy']:.1%}", flush=True)


def _tune(bench: Bench, run: Run, weights: Weights, samples: int) -> None:
    """Attack the validation images with the first two parts of AutoAttack."""
    results = run.record.get("tuning", {})
    if str(samples) in results:
        return
    began = time.perf_counter()
    model, images = classifier(weights, bench.protocol), bench.splits.validation.first(samples)
    clean = mask = right(model, images, bench.protocol.device)
    for stage in ALWAYS[1:]:
        mask = left(model, bench.protocol.attack(stage), images, mask, bench.protocol.device)
    done = measured(mask, time.perf_counter() - began) | {"clean": round(float(clean.float().mean()), 6)}
    run.store(tuning=results | {str(samples): done})
    print(f"  {title(run)}: {done['accuracy']:.1%} of {len(mask)}", flush=True)


def title(run: Run) -> str:
    """Recipe and seed, for messages."""
    identity = run.identity
    return f"{identity['recipe']}{'+avg' * identity['averaged']} ({settings(identity)}), seed {identity['seed']}"

"""Reweighting where adversarial training overfits: few images, many epochs, and the final epoch beside the best one.

    python -m benchmarks.defenses.overfitting --data DIR          # about 15 minutes on one core
    python -m benchmarks.defenses.overfitting --data DIR --seeds 5

``pgd-at`` on 1,000 MNIST images, with and without ``SampleReweighting``. The radius of the ball is chosen among a few by the robust accuracy
on validation images, with one seed. The best epoch of each run is chosen by PGD on validation images; then the final and the best
epoch's weights meet PGD-50, APGD-CE and APGD-T on test images. Differences are paired by seed, with 95% t-intervals.

It can be stopped, or killed, and goes on with the run that it was at.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.defenses.runs import describe, hardware
from benchmarks.shared.accuracy import CHUNK, left, right
from benchmarks.shared.data import Splits, load
from benchmarks.shared.files import kept, scratch, short_hash, write_atomically, write_text
from benchmarks.shared.models import Classifier
from benchmarks.shared.protocol import ALWAYS, CLEAN, PROTOCOLS, STAGES, Protocol
from benchmarks.shared.statistics import estimate, paired
from benchmarks.shared.training import ChosenEpoch, classifier, loader, trainer
from lightning_wdefense import Recipe, RobustnessMonitor, WassersteinDefense
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import SampleReweighting

PROTOCOL = replace(
    PROTOCOLS["mnist"], train=1000, validation=500, test=500, epochs=40, batch_size=50, schedule="one-cycle", lr=1e-2,
    attack_precision="32", validation_steps=10,
)  # fmt: skip
RADII = (0.03, 0.1, 0.3)
LAST = 5
"""Epochs at the end whose mean robust accuracy on validation images chooses the radius: one epoch's is noisy."""
EPOCHS = ("final", "best")


def recipe(radius: float | None, protocol: Protocol) -> Recipe:
    reweighting = None if radius is None else SampleReweighting(radius=radius)
    return Recipe.named("pgd-at", protocol.threat, reweighting=reweighting)


def trained(
    radius: float | None, protocol: Protocol, splits: Splits, seed: int, work: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The history of a training, and the weights of its final and its best epoch."""
    L.seed_everything(seed, verbose=False)
    defense, module = recipe(radius, protocol), Classifier(protocol)
    judge = PGD(protocol.threat, steps=protocol.validation_steps)
    began = time.perf_counter()
    with scratch(work) as folder:
        chosen = ChosenEpoch(str(folder), protocol.first_epoch(defense.warmup_epochs))
        monitor = RobustnessMonitor(protocol.threat, {"pgd": judge}, features=None, progress=False)
        fit = trainer(
            protocol,
            [WassersteinDefense(defense, seed=seed), monitor, chosen],
            max_epochs=protocol.epochs,
            enable_checkpointing=True,
        )
        fit.fit(module, loader(splits.train, protocol.batch_size, seed), loader(splits.validation, CHUNK))
        best = torch.load(chosen.best_model_path, map_location="cpu", weights_only=True)
    history = {"validation_pgd": chosen.history, "best_epoch": best["epoch"], "seconds": time.perf_counter() - began}
    return history, {"final": module.state_dict(), "best": best["state_dict"]}


def attacked(weights: dict[str, Tensor], protocol: Protocol, splits: Splits) -> dict[str, float]:
    """What is left of the test images, clean and after each attack."""
    model = classifier(weights, protocol)
    masks = {CLEAN: right(model, splits.test, protocol.device)}
    for stage in ALWAYS:
        masks[stage] = left(model, protocol.attack(stage), splits.test, masks[STAGES[stage]], protocol.device)
    return {stage: float(mask.float().mean()) for stage, mask in masks.items()}


def run(
    radius: float | None, protocol: Protocol, splits: Splits, seed: int, work: Path, *, test: bool
) -> dict[str, Any]:
    """The record of a run, from the work folder if it is there."""
    identity = {"protocol": asdict(protocol), "radius": radius, "seed": seed, "test": test}

    def compute() -> dict[str, Any]:
        history, weights = trained(radius, protocol, splits, seed, work)
        found = {each: attacked(weights[each], protocol, splits) for each in EPOCHS} if test else {}
        record = {"radius": radius, "seed": seed, **history, "test": found}
        print(f"radius {radius}, seed {seed}: {found or history['validation_pgd'][-LAST:]}", flush=True)
        return record

    return kept(work / f"{short_hash(identity)}.json", compute)


def summary(plain: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and paired differences, in per cent and points, of each epoch and attack."""
    rows = []
    for epoch in EPOCHS:
        for stage in (CLEAN, *ALWAYS):
            sides = [{seed: 100 * one["test"][epoch][stage] for seed, one in runs.items()} for runs in (plain, ours)]
            values = [estimate(list(side.values())) for side in sides]
            rows.append({"epoch": epoch, "attack": stage, "plain": values[0], "reweighted": values[1]})
            rows[-1]["difference"] = paired(sides[1], sides[0])
    return [
        {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in row.items()} for row in rows
    ]


def drops(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """How much the final epoch has lost since the best one, under APGD-CE and APGD-T, in points."""
    lost = {seed: [100 * one["test"][each]["apgd-t"] for each in EPOCHS] for seed, one in runs.items()}
    found = estimate([best - final for final, best in lost.values()])
    assert found is not None
    return found._asdict()


def _text(value: dict[str, Any], *, sign: bool = False) -> str:
    mean = f"{value['mean']:{'+' if sign else ''}.1f}"
    return mean if value["half"] is None else f"{mean} ± {value['half']:.1f}"


def markdown(content: dict[str, Any]) -> str:
    protocol = content["protocol"]
    lines = [
        f"# {__doc__.splitlines()[0]}",
        "",
        f"`pgd-at` on {protocol['train']} MNIST images, L∞ {protocol['eps']}, {protocol['epochs']} epochs, one-cycle to {protocol['lr']}, batches of "
        f"{protocol['batch_size']}; per cent of {protocol['test']} test images, means over {content['seeds']} seeds ± half a 95% t-interval; "
        "differences are paired by seed, in points.",
        "",
        "| epoch | attack | `pgd-at` | with `SampleReweighting` | difference |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [_text(row["plain"]), _text(row["reweighted"]), _text(row["difference"], sign=True)]
        lines.append(f"| {row['epoch']} | {row['attack']} | {' | '.join(cells)} |")
    tuning = ", ".join(f"{radius}: {100 * value:.1f}" for radius, value in content["tuning"].items())
    lines += [
        "",
        f"What the final epoch has lost since the best one (APGD-T, points): {_text(content['drop']['plain'])} without, "
        f"{_text(content['drop']['reweighted'])} with reweighting.",
        "",
        f"The radius is {content['radius']}, chosen with seed 0 by PGD on {protocol['validation']} validation images, the mean of the last {LAST} epochs, "
        f"per cent ({tuning}; without reweighting {100 * content['tuning_plain']:.1f}).",
        "",
        f"`apgd-t` is what APGD-CE and then APGD-T leave. {content['hardware']}.",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defenses.overfitting", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=PROTOCOL.epochs)
    parser.add_argument("--limit-train", type=int, default=PROTOCOL.train)
    parser.add_argument("--limit-test", type=int, default=PROTOCOL.test)
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/overfitting"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overfitting_mnist"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    protocol = replace(PROTOCOL, epochs=options.epochs, train=options.limit_train, test=options.limit_test)
    try:
        splits = load(protocol, options.data)
    except ValueError as error:
        parser.error(str(error))
    protocol = replace(protocol, data=splits.fingerprint)
    tried = {radius: run(radius, protocol, splits, 0, options.work, test=False) for radius in options.radii}
    tuning = {radius: statistics.mean(found["validation_pgd"][-LAST:]) for radius, found in tried.items()}
    radius = max(tuning, key=lambda each: tuning[each])
    plain, ours = (
        {seed: run(each, protocol, splits, seed, options.work, test=True) for seed in range(options.seeds)}
        for each in (None, radius)
    )
    content = {
        "protocol": asdict(protocol),
        "seeds": options.seeds,
        "radius": radius,
        "tuning": tuning,
        "tuning_plain": statistics.mean(plain[0]["validation_pgd"][-LAST:]),
        "rows": summary(plain, ours),
        "drop": {"plain": drops(plain), "reweighted": drops(ours)},
        "hardware": describe(hardware(protocol)),
        "runs": [*tried.values(), *plain.values(), *ours.values()],
    }
    write_atomically(options.output.with_suffix(".json"), content)
    write_text(options.output.with_suffix(".md"), text := markdown(content))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Robust accuracy of recipe ``critic`` over the settings of its critic.

Training and attacks are those of ``benchmarks.defenses`` on the same data: APGD-CE and APGD-T on the test images, the worst case of both. One setting is
varied at a time, with the others at their defaults. ``penalty`` of ours is the gradient penalty in place of orthonormal layers.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.critic.accuracy.plain import PlainDiscrepancy
from benchmarks.shared.accuracy import left, right
from benchmarks.shared.data import Splits, load
from benchmarks.shared.files import read, write_atomically
from benchmarks.shared.protocol import PROTOCOLS, Protocol
from benchmarks.shared.training import classifier, train
from benchmarks.shared.variants import Variant
from lightning_wdefense import Recipe, ThreatModel
from lightning_wdefense.defenses.critic import CriticDiscrepancy

RATES = (10**-1.5, 0.1, 10**-0.5, 1.0, 10**0.5, 10.0, 20.0)
"""Learning rates in multiples of the default: nearly three decades (our rate is at most 1, 20 times its default). The central one is 10^-0.5 to 10^0.5."""
STEPS, PENALTIES = (1, 2, 5, 10), (0.1, 1.0, 10.0, 100.0)
OURS, PLAIN, NONE = "ours", "plain WGAN-GP", "no critic"
DEFAULT = "default"
DECADES = [f"lr x {rate:.3g}" for rate in RATES]
CENTRAL_DECADE = DECADES[2:5]
"""With the defaults, what is measured on every dataset."""


@dataclass(frozen=True)
class CriticVariant(Variant):
    """Recipe ``critic`` with a critic of its own; ``None`` for adversarial training alone."""

    critic: CriticDiscrepancy | None = None

    def recipe(self, threat: ThreatModel) -> Recipe:
        if self.critic is None:
            return Recipe.named("pgd-at", threat)
        return Recipe.named("critic", threat, discrepancy=self.critic)


def cells() -> dict[str, CriticDiscrepancy | None]:
    """``critic|setting`` and the critic, the centre first; what is the default on several axes is there once."""
    found: dict[str, CriticDiscrepancy | None] = {f"{NONE}|{DEFAULT}": None}
    bases = {OURS: CriticDiscrepancy(), PLAIN: PlainDiscrepancy()}
    found |= {f"{name}|{DEFAULT}": base for name, base in bases.items()}
    changes = [(f"lr x {rate:.3g}", "rate", rate) for rate in sorted(RATES, key=lambda rate: abs(math.log(rate)))]
    changes[3:3] = [(f"penalty {penalty:g}", "penalty", penalty) for penalty in PENALTIES]
    changes[3:3] = [(f"{steps} steps", "max_steps", steps) for steps in STEPS]
    for setting, axis, value in changes:
        for name, base in bases.items():
            if axis == "rate":
                critic = replace(base, lr=float(f"{base.lr * value:.2g}"))
            elif axis == "penalty":
                critic = replace(base, penalty=value, lipschitz="gradient-penalty")
            else:
                critic = replace(base, max_steps=int(value))
            # Plain WGAN-GP has the penalty anyway.
            if critic != base and (name, setting) != (PLAIN, f"penalty {base.penalty:g}"):
                found[f"{name}|{setting}"] = critic
    return found


def accuracy(
    critic: CriticDiscrepancy | None, protocol: Protocol, splits: Splits, seed: int, folder: Path
) -> dict[str, Any]:
    """Train, with checkpoints in the folder, and attack once; seconds are those of the processor."""
    start = time.process_time()
    variant = CriticVariant("critic", "critic", {}, critic=critic)
    done, weights = train(variant, protocol, splits.train, splits.validation, seed, folder)
    if weights is None:
        return {"diverged": done["diverged"]}
    model = classifier(weights, protocol)
    clean = mask = right(model, splits.test, protocol.device)
    for stage in ("apgd-ce", "apgd-t"):
        mask = left(model, protocol.attack(stage), splits.test, mask, protocol.device)
    return {
        "clean": round(float(clean.float().mean()), 6),
        "robust": round(float(mask.float().mean()), 6),
        "seconds": round(time.process_time() - start, 1),
    }


def adopt(results: dict[str, Any], identity: dict[str, Any], written: Path) -> None:
    """Take over what ``benchmarks.defenses`` has measured of the same settings under the same protocol."""
    table = read(written)
    if table.get("protocol") != identity:
        return
    threat = ThreatModel(eps=identity["eps"])
    recipes = {key: CriticVariant(key, key, {}, critic=critic).recipe(threat) for key, critic in cells().items()}
    for run in table["runs"]:
        if run["averaged"] or "apgd-t" not in run.get("test", {}):
            continue
        recipe = Variant(run["recipe"], run["recipe"], run["changes"]).recipe(threat)
        for key in (key for key, each in recipes.items() if each == recipe):
            test = {"clean": run["test"]["clean"]["accuracy"], "robust": run["test"]["apgd-t"]["accuracy"]}
            results.setdefault(key, {}).setdefault(str(run["seed"]), test | {"from": written.name})


def measure(path: Path, seeds: int, dataset: str, data: Path | None, machine: str) -> None:
    """Do what is not stored yet; each run is stored as it ends. Of another dataset than digits the central decade alone.

    Raises:
        ValueError: if what is stored was measured under another protocol.
    """
    # bf16 is five times slower on a processor that has no instructions for it.
    protocol = replace(PROTOCOLS[dataset], attack_precision="32")
    splits = load(protocol, data)
    identity = asdict(replace(protocol, data=splits.fingerprint))
    stored = read(path)
    if stored.setdefault(dataset, {"protocol": identity, "results": {}})["protocol"] != identity:
        raise ValueError(f"{path} was measured under another protocol: move it away.")
    stored["hardware"] = machine
    adopt(stored[dataset]["results"], identity, path.parent / f"defenses_{dataset}.json")
    wanted = {
        key: critic
        for key, critic in cells().items()
        if dataset == "digits" or key.split("|")[1] in (DEFAULT, *CENTRAL_DECADE)
    }
    for seed in range(seeds):  # seed by seed, so that an early look sees all settings
        for key, critic in wanted.items():
            runs = stored[dataset]["results"].setdefault(key, {})
            if str(seed) not in runs:
                runs[str(seed)] = accuracy(critic, protocol, splits, seed, path.parent)
                write_atomically(path, stored)
                print(f"{dataset}, {key}, seed {seed}: {runs[str(seed)]}", flush=True)

"""How well detectors tell attacked images from clean ones, for attacks matched on success, non-adaptive and adaptive.

    python -m benchmarks.detectability --dataset mnist --data folder    # holds mnist.npz
    python -m benchmarks.detectability --quick                          # scikit-learn's digits, only to see that it runs

Each part is stored in ``--work`` when it is done, so that a run that was stopped goes on where it was. Attacks that are not
registered are left out with a message.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.detectability.attacks import (
    SPECS,
    attack_all,
    evading,
    matching_eps,
    observe,
    scores,
)
from benchmarks.detectability.attacks import Seen as SeenModel
from benchmarks.detectability.report import markdown, plot
from benchmarks.shared.accuracy import fooled
from benchmarks.shared.classifiers import MODELS, add_arguments, identity, seeds, trained
from benchmarks.shared.data import Splits, load
from benchmarks.shared.files import kept, short_hash, sweep, write_atomically, write_text
from benchmarks.shared.machine import command, hardware
from benchmarks.shared.protocol import Protocol
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import ATTACKS
from lightning_wdefense.detection import DETECTORS, CriticScore, Detector, FeatureSqueezing, two_sample_test
from lightning_wdefense.metrics import detectability

DETECTOR_NAMES = [name for name, kind in DETECTORS.items() if kind is not CriticScore]
STATISTICS = ("energy", "mmd", "sinkhorn")
WEIGHTS = [0.3, 3.0]
"""Of the detector's score in an adaptive attack."""
PERMUTATIONS = 99


class Bench:
    """One trained model with its detectors, and what was measured of it."""

    def __init__(self, model: str, seed: int, data: Splits, options: argparse.Namespace) -> None:
        self.identity = identity(model, seed, data, options)
        self.model, self.options = model, options
        self.folder = options.work / short_hash(self.identity | {"attacked": options.attacked})
        self.network = trained(model, seed, data, options)
        for name in ("train", "validation", "test"):
            x, y = (part.to(options.device) for part in getattr(data, name))
            setattr(self, name, (x, y) if name == "train" else self._right(x, y))
        self.test = tuple(part[: options.attacked] for part in self.test)
        x, y = (part[: options.learned] for part in self.train)
        seen = observe(self.network, x)
        self.detectors = {name: self._fitted(name, seen, y) for name in DETECTOR_NAMES}
        self.clean = observe(self.network, self.test[0])

    def _right(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        right = ~fooled(self.network, x, y)
        return x[right], y[right]

    def _fitted(self, name: str, seen: Any, labels: Tensor) -> Detector:
        if name == FeatureSqueezing.name:
            return FeatureSqueezing(ThreatModel(), self.network, bits=1)
        detector = DETECTORS[name]()
        return detector.fit(seen.logits if detector.reads == "outputs" else seen.features, labels)

    def part(self, name: str, compute: Callable[[], dict[str, Any]], **identity: Any) -> dict[str, Any]:
        """What ``compute`` returned, now or in an earlier run; says what it begins."""

        def compute_aloud() -> dict[str, Any]:
            where = [str(identity[key]) for key in ("attack", "success", "detector") if key in identity]
            print(f"{self.model}, seed {self.identity['seed']}: {name} {' '.join(where)}", flush=True)
            return compute()

        return kept(self.folder / f"{name}-{short_hash(identity)}.json", compute_aloud)

    def cell(self, attack: str, success: float) -> dict[str, Any] | None:
        """All that is measured of one attack at one success; ``None`` if it cannot reach it."""
        spec, options = SPECS[attack], self.options
        place = {
            "attack": attack,
            "success": success,
            "settings": repr(spec),
            "matched": options.matched,
            "learned": options.learned,
        }
        x, y = (part[: options.matched] for part in self.validation)
        eps = self.part(
            "match", lambda: {"eps": matching_eps(spec, self.network, x, y, success, options.bisections)},
            **place, bisections=options.bisections,
        )["eps"]  # fmt: skip
        if eps is None:
            return None
        found: dict[str, Any] = {
            "model": self.model,
            "attack": attack,
            "success": success,
            "seed": self.identity["seed"],
            "eps": eps,
        }
        cached: list[tuple[Tensor, Tensor]] = []

        def attacked() -> tuple[Tensor, Tensor]:
            if not cached:
                adversarial = attack_all(spec.build(eps), self.network, *self.test)
                cached.append((adversarial, fooled(self.network, adversarial, self.test[1])))
            return cached[0]

        place |= {"eps": eps}
        found |= self.part("plain", lambda: self._plain(*attacked()), **place)
        images = lambda: attacked()[0][attacked()[1]]  # noqa: E731
        found |= self.part("power", lambda: {"power": self._power(images())}, **place, **self._tests())
        found["adaptive"] = {}
        for name in DETECTOR_NAMES:
            part = self.part(
                "adaptive",
                lambda name=name: self._adaptive(spec, eps, name, *attacked()),
                **place,
                detector=name,
                weights=WEIGHTS,
            )
            found["adaptive"][name] = part["auroc"]
        return found

    def _auroc(self, name: str, adversarial_scores: Tensor) -> list[float]:
        clean = scores(self.detectors[name], self.clean)
        return [round(float(value), 4) for value in detectability(clean, adversarial_scores)]

    def _plain(self, adversarial: Tensor, broken: Tensor) -> dict[str, Any]:
        seen = observe(self.network, adversarial[broken]) if broken.any() else None
        values = {
            name: self._auroc(name, scores(detector, seen)) if seen else [math.nan] * 3
            for name, detector in self.detectors.items()
        }
        return {"reached": float(broken.float().mean()), "broken": int(broken.sum()), "plain": values}

    def _adaptive(self, spec: Any, eps: float, name: str, adversarial: Tensor, broken: Tensor) -> dict[str, Any]:
        """The lowest score of each broken image over all weights, at the same success."""
        detector = self.detectors[name]
        if not broken.any():
            return {"auroc": [math.nan] * 3}
        x, y = (part[broken] for part in self.test)
        lowest = scores(detector, observe(self.network, adversarial[broken]))
        try:
            for attack in evading(spec, eps, self.network, detector, self.validation, WEIGHTS):
                candidate = attack_all(attack, SeenModel(self.network), x, y)
                score = scores(detector, observe(self.network, candidate))
                lowest = torch.where(fooled(self.network, candidate, y), torch.minimum(lowest, score), lowest)
        except (TypeError, ValueError) as error:
            print(f"{spec.name} cannot be told to evade {name}: {error}", file=sys.stderr)
            return {"auroc": None}
        return {"auroc": self._auroc(name, lowest)}

    def _power(self, images: Tensor) -> dict[str, float]:
        """The share of batches of these images that a test rejects."""
        options = self.options
        reference = observe(self.network, self.validation[0][: options.reference]).features
        features = observe(self.network, images).features if len(images) else images.new_empty(0, reference.shape[1])
        generator, values = torch.Generator().manual_seed(0), {}
        batches = [torch.randperm(len(features), generator=generator)[: options.batch] for _ in range(options.batches)]
        for statistic in STATISTICS:
            rejected = [
                two_sample_test(
                    reference, features[index.to(features.device)], statistic, permutations=PERMUTATIONS, seed=seed
                ).p_value
                <= 0.05
                for seed, index in enumerate(batches)
                if len(index) == options.batch
            ]
            values[statistic] = sum(rejected) / len(rejected) if rejected else math.nan
        return values

    def false_alarms(self) -> dict[str, float]:
        return self.part("alarms", lambda: self._power(self.test[0]), **self._tests())

    def _tests(self) -> dict[str, int]:
        """What decides the outcome of the tests of whole batches."""
        names = ("batch", "batches", "reference")
        return {name: getattr(self.options, name) for name in names} | {"permutations": PERMUTATIONS}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectability", description=__doc__.splitlines()[0])
    add_arguments(parser, dataset="digits")
    parser.add_argument("--attacks", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--success", nargs="+", type=float, default=[0.9], help="shares that the attacks shall break")
    parser.add_argument("--matched", type=int, default=256, help="of them, right ones, on which radii are chosen")
    parser.add_argument("--attacked", type=int, default=300, help="of them, right ones, that are attacked")
    parser.add_argument("--learned", type=int, default=5000, help="training images that detectors learn from")
    parser.add_argument("--bisections", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="images in a batch that is tested as a whole")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--reference", type=int, default=128, help="clean images that such a batch is compared with")
    options = parser.parse_args(argv)
    if options.dataset == "digits":
        options.train, options.validation, options.test = (
            min(options.train, 1000),
            min(options.validation, 300),
            min(options.test, 450),
        )
    if options.quick:
        options.seeds, options.epochs, options.success, options.batches, options.bisections = [1], 4, [0.5], 3, 3
        options.test, options.matched, options.learned = 150, 96, 400
    return options


def main(argv: Sequence[str] | None = None) -> None:
    warnings.filterwarnings("ignore")
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    sweep(options.work, below=True)
    protocol = Protocol(options.dataset, options.train, options.validation, options.test, 0.0, options.epochs, 128)
    data = load(protocol, options.data)
    skipped = [
        f"attack {name!r}: {SPECS[name].name!r} is not registered."
        for name in options.attacks
        if not SPECS[name].registered
    ]
    skipped += [
        f"model {name!r}: {MODELS[name][0]!r} is not registered."
        for name in options.models
        if MODELS[name] and MODELS[name][0] not in ATTACKS
    ]
    for note in skipped:
        print(f"Left out: {note}", file=sys.stderr)
    cells, alarms = [], {}
    for model in options.models:
        if MODELS[model] and MODELS[model][0] not in ATTACKS:
            continue
        for seed in seeds(model, options):
            bench = Bench(model, seed, data, options)
            for attack in options.attacks:
                for success in options.success if SPECS[attack].registered else ():
                    cell = bench.cell(attack, success)
                    if cell is None:
                        skipped.append(
                            f"attack {attack!r} breaks {success:.0%} of {model!r} (seed {seed}) at no radius."
                        )
                    else:
                        cells.append(cell)
            alarms.setdefault(model, []).append(bench.false_alarms())
    result = {
        "environment": {
            "command": command("detectability", sys.argv[1:] if argv is None else argv),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            **{
                name: getattr(options, name)
                for name in ("dataset", "seeds", "train", "attacked", "learned", "batch", "batches", "reference")
            },
        },
        "detectors": DETECTOR_NAMES,
        "statistics": STATISTICS,
        "skipped": skipped,
        "cells": cells,
        "false_alarms": {
            model: {s: sum(each[s] for each in found) / len(found) for s in STATISTICS}
            for model, found in alarms.items()
        },
    }
    name = f"detectability_{options.dataset}"
    write_atomically(options.output / f"{name}.json", result)
    write_text(options.output / f"{name}.md", markdown(result))
    plot(result, options.output / f"{name}.png")
    print(markdown(result))


if __name__ == "__main__":
    main()

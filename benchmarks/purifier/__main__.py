"""What a purifier in front of an undefended classifier is worth: naively evaluated, and attacked through.

    python -m benchmarks.purifier --seeds 3 --output benchmarks/results

scikit-learn digits, L-infinity radius 0.2. Of each seed one classifier, trained without attacks; before it no purifier, one trained as the papers
did (on attacks of the classifier alone), and one trained on attacks that go through it; both also without their critic. The reference is the same
network trained adversarially (recipe ``pgd-at``) for as many epochs with the same attack. *Naive*: PGD attacks the classifier alone, and the
purifier sees the result. *Through*: the attack sees purifier and classifier as one. Everything is measured after the last epoch. A run that was
interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.shared.data import Images, Splits, load
from benchmarks.shared.files import alone, read, write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.models import Classifier
from benchmarks.shared.protocol import PROTOCOLS, Protocol
from benchmarks.shared.statistics import estimate, paired
from benchmarks.shared.training import loader, trainer
from lightning_wdefense import Recipe, WassersteinDefense
from lightning_wdefense.attacks import PGD, AutoAttack, worst_case
from lightning_wdefense.defenses import PurifiedClassifier, ResidualGenerator, WassersteinPurifier

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*(LeafSpec|treespec).*")

PURIFIERS: dict[str, dict[str, Any]] = {
    "trained as usual": {"through": False},
    "trained as usual, no critic": {"through": False, "critic_weight": 0.0},
    "trained through": {"through": True},
    "trained through, no critic": {"through": True, "critic_weight": 0.0},
}
BARE, REFERENCE = "no purifier", "pgd-at, no purifier"
MODELS = (BARE, *PURIFIERS, REFERENCE)
FIGURES = {
    "clean": "clean",
    "naive": "naive PGD",
    "bpda": "BPDA through",
    "pgd": "PGD through",
    "autoattack": "AutoAttack through",
}
DIFFERENCES = (
    ("trained through", "trained as usual"),
    ("trained as usual", "trained as usual, no critic"),
    ("trained through", "trained through, no critic"),
    ("trained through", REFERENCE),
)  # fmt: skip
LR, WIDTH = 3e-3, 256
BUDGET = ("epochs", "train", "test", "pgd_steps", "attack_steps", "queries")


def trained(protocol: Protocol, images: Images, seed: int, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The models of one seed; all purifiers stand before the same classifier."""

    def fit(module: L.LightningModule, *callbacks: L.Callback) -> nn.Module:
        L.seed_everything(seed, verbose=False)
        trainer(protocol, list(callbacks), max_epochs=protocol.epochs).fit(
            module, loader(images, protocol.batch_size, seed)
        )
        return module.eval()

    def classifier() -> Classifier:
        L.seed_everything(seed, verbose=False)
        return Classifier(protocol)

    recipe = Recipe.named("pgd-at", protocol.threat)
    assert recipe.attack is not None
    bare = fit(classifier())
    models: dict[str, nn.Module] = {BARE: bare}
    for name, options in PURIFIERS.items():
        if name in names:
            generator = ResidualGenerator(64, width=WIDTH, seed=seed)
            purifier = WassersteinPurifier(
                bare, protocol.threat, recipe.attack, generator=generator, lr=LR, seed=seed, **options
            )
            models[name] = fit(purifier).purified
    if REFERENCE in names:
        models[REFERENCE] = fit(classifier(), WassersteinDefense(recipe, seed=seed))
    return models


def measured(protocol: Protocol, model: nn.Module, images: Images) -> dict[str, float]:
    """Shares of the images that are classified rightly."""
    pgd = protocol.attack("pgd")
    whole = model if isinstance(model, PurifiedClassifier) else PurifiedClassifier(nn.Identity(), model)
    bpda = PurifiedClassifier(whole.purifier, whole.classifier, bpda=True)
    seen = pgd(whole.classifier, images.x, images.y)
    autoattack = AutoAttack(protocol.threat, steps=protocol.attack_steps, queries=protocol.queries)

    def right(inputs: torch.Tensor) -> float:
        with torch.no_grad():
            return float((whole(inputs).argmax(1) == images.y).float().mean())

    def left(attacked: nn.Module, attack: PGD | AutoAttack) -> float:
        return float(worst_case(attacked, {"attack": attack}, images.x, images.y).robust.float().mean())

    return {
        "clean": right(images.x),
        "naive": right(seen),
        "bpda": left(bpda, pgd),
        "pgd": left(whole, pgd),
        "autoattack": left(whole, autoattack),
    }


def markdown(
    protocol: Protocol,
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    machine: str,
    changes: Mapping[str, int],
) -> str:
    """Figures of every model, differences of some, and how they were made."""
    names = [name for name in MODELS if results.get(name)]
    seeds = len(results[names[0]])

    def by_seed(name: str, figure: str) -> dict[int, float]:
        return {int(seed): figures[figure] for seed, figures in results.get(name, {}).items()}

    def text(found: Any, **options: Any) -> str:
        return "–" if found is None else found.text(**options)

    lines = [
        f"# A purifier in front of a classifier: {protocol.dataset}, L-infinity radius {protocol.eps:g}",
        "",
        "| model | " + " | ".join(FIGURES.values()) + " |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for name in names:
        cells = [text(estimate(list(by_seed(name, figure).values()))) for figure in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rows = []
    for ours, theirs in DIFFERENCES:
        if ours in names and theirs in names:
            cells = [text(paired(by_seed(ours, figure), by_seed(theirs, figure)), sign=True) for figure in FIGURES]
            rows.append(f"| {ours} − {theirs} | " + " | ".join(cells) + " |")
    if rows:
        lines += ["", "| difference | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|", *rows]
    budget = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changes.items())
    command = f"python -m benchmarks.purifier --seeds {seeds}{budget} --output benchmarks/results"
    lines += [
        "",
        f"Accuracy in per cent of {protocol.test} test images after the last of {protocol.epochs} epochs, and differences in points: means over "
        f"{seeds} seeds ± half a 95% t-interval, differences paired by seed. Naive PGD: made against the classifier alone. Through: made against "
        f"purifier and classifier as one. PGD: {protocol.pgd_steps} steps, {protocol.pgd_restarts} restarts; BPDA is the same with the identity "
        f"for the purifier's gradient. AutoAttack: {protocol.attack_steps} steps, {protocol.queries} queries; on its own, not after PGD. "
        f"Purifier: ResidualGenerator(64, width={WIDTH}), Adam at {LR:g}, all weights 1 (critic 0 where it says so).",
        "",
        f"`{command}` on {machine}.",
        "",
    ]
    return "\n".join(lines)


def complete(
    path: Path, protocol: Protocol, splits: Splits, options: argparse.Namespace, machine: str
) -> dict[str, Any]:
    """Measure what is not stored yet, model by model; all results."""
    identity = {"hardware": machine, "protocol": asdict(replace(protocol, data=splits.fingerprint))}
    stored = read(path)
    results = stored["results"] if {key: stored.get(key) for key in identity} == identity else {}
    for seed in range(options.seeds):
        missing = tuple(name for name in options.models if str(seed) not in results.get(name, {}))
        if not missing:
            continue
        start = time.perf_counter()
        models = trained(protocol, splits.train, seed, missing)
        print(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s", flush=True)
        for name in missing:
            start = time.perf_counter()
            found = {figure: round(share, 4) for figure, share in measured(protocol, models[name], splits.test).items()}
            results.setdefault(name, {})[str(seed)] = found
            print(f"seed {seed}, {name}: {found} ({time.perf_counter() - start:.0f} s)", flush=True)
            write_atomically(path, identity | {"results": results})
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.purifier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    for name in BUDGET:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help="another budget")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    changes = {name: value for name in BUDGET if (value := getattr(options, name)) is not None}
    protocol = replace(PROTOCOLS["digits"], **changes)
    splits = load(protocol, None)
    options.output.mkdir(parents=True, exist_ok=True)
    path, machine = options.output / "purifier_digits.json", hardware("cpu")
    with alone(path):
        results = complete(path, protocol, splits, options, machine)
    text = markdown(protocol, results, machine, changes)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()

"""Which models are compared, and how each is trained: L2 on MNIST, one-cycle, the last epoch's weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.shared.data import Images
from benchmarks.shared.files import load, save
from benchmarks.shared.models import NETWORKS, Classifier
from benchmarks.shared.protocol import Protocol
from benchmarks.shared.training import loader, prepared, trainer
from benchmarks.shared.variants import Variant
from lightning_wdefense import ThreatModel, WassersteinDefense
from lightning_wdefense.defenses.recipe import RECIPES

STEPS = 10
"""Of every training attack."""
SIGMA = 0.5
"""Of the Gaussian noise, in data units."""


@dataclass(frozen=True)
class L2Protocol(Protocol):
    """The protocol for an L2 ball."""

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(norm="l2", eps=self.eps)


@dataclass(frozen=True)
class Model:
    """One row of the comparison.

    Args:
        label: its name in tables and files.
        recipe: name of its recipe.
        eps: L2 radius of its training attack, data units.
        changes: to the preset, as in ``Variant``.
        noise: standard deviation of Gaussian noise on the training images.
    """

    label: str
    recipe: str
    eps: float = 1.5
    changes: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0


ATTACKED = {"attack.steps": STEPS}
MODELS = {
    model.label: model
    for model in (
        Model("standard", "standard"),
        Model("pgd-at 1.5", "pgd-at", 1.5, ATTACKED),
        Model("pgd-at 1", "pgd-at", 1.0, ATTACKED),
        Model("pgd-at 2", "pgd-at", 2.0, ATTACKED),
        Model("pgd-at 2.5", "pgd-at", 2.5, ATTACKED),
        Model("pgd-at 3", "pgd-at", 3.0, ATTACKED),
        Model("trades", "trades", 1.5, ATTACKED),
        # The preset starts as PGD and its multiplier hardly moves in so few batches: UDR would be pgd-at by another name.
        Model("udr", "udr", 1.5, {**ATTACKED, "attack.multiplier": 0.5, "attack.multiplier_rate": 0.02}),
        Model("wrm", "wrm", 1.5, ATTACKED),
        Model("wrm 0.1", "wrm", 1.5, {**ATTACKED, "attack.gamma": 0.1}),
        Model("class-transport", "class-transport", 1.5, ATTACKED),
        Model("distributional-at", "distributional-at", 1.5, ATTACKED),
        Model("distributional-at 1", "distributional-at", 1.0, ATTACKED),
        Model("gaussian-noise", "standard", noise=SIGMA),
    )
}
"""In the order in which each seed's models are trained. One more line is one more model."""


class NoisyClassifier(Classifier):
    """Sees its training images under Gaussian noise, as randomised smoothing asks for."""

    def __init__(self, protocol: Protocol, sigma: float, seed: int) -> None:
        super().__init__(protocol)
        from lightning_wdefense.defenses import GaussianSmoothing

        self.smoothing, self.noise = GaussianSmoothing(sigma), torch.Generator().manual_seed(seed)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = super().on_after_batch_transfer(batch, dataloader_idx)
        return (self.smoothing.noisy(x, self.noise) if self.trainer.training else x), y


def available(model: Model) -> bool:
    """Whether this version of the package can train it."""
    if model.noise:
        from lightning_wdefense import defenses

        return hasattr(defenses, "GaussianSmoothing")
    return model.recipe in RECIPES


def place(work: Path, label: str, seed: int) -> Path:
    """Of a network's weights."""
    return work / f"{label.replace(' ', '-')}-seed{seed}.pt"


def identity(model: Model, seed: int, protocol: Protocol) -> dict[str, Any]:
    """All that decides the weights, as the table says it: another version of the package does not train anew."""
    budget = {key: getattr(protocol, key) for key in ("train", "epochs", "batch_size", "lr", "warmup_epochs")}
    return {"model": {**asdict(model), "changes": dict(model.changes)}, "seed": seed, **budget}


def train_all(work: Path, labels: list[str], seeds: int, protocol: L2Protocol, images: Images) -> None:
    """Seed by seed, what is not stored yet; so an interrupted run goes on where it was."""
    for seed in range(seeds):
        for label in labels:
            model, path = MODELS[label], place(work, label, seed)
            if not available(model):
                print(f"seed {seed}, {label}: this version of the package has no such recipe, skipped", flush=True)
                continue
            wanted = identity(model, seed, protocol)
            stored = load(path)
            if stored is not None and stored["identity"] == wanted:
                continue
            began = time.perf_counter()
            network = train(model, protocol, images, seed)
            save(path, {"identity": wanted, "weights": network.state_dict()})
            print(f"seed {seed}, {label}: {time.perf_counter() - began:.0f} s", flush=True)


def train(model: Model, protocol: L2Protocol, images: Images, seed: int) -> nn.Module:
    """The network after the last epoch."""
    variant = Variant(model.label, model.recipe, model.changes)
    own = L2Protocol(**{**asdict(protocol), "eps": model.eps})
    L.seed_everything(seed, verbose=False)
    module = NoisyClassifier(own, model.noise, seed) if model.noise else Classifier(own)
    recipe = prepared(variant, own)
    callbacks: list[L.Callback] = [] if recipe.attack is None else [WassersteinDefense(recipe, seed=seed)]
    trainer(own, callbacks, max_epochs=own.epochs).fit(module, loader(images, own.batch_size, seed))
    return module.net.eval()


def stored_networks(work: Path, labels: list[str], seeds: int) -> Iterator[tuple[str, int, nn.Module]]:
    """Label, seed and network of all that have been trained."""
    for label in labels:
        for seed in range(seeds):
            if (stored := load(place(work, label, seed))) is not None:
                network = NETWORKS["mnist"]()
                network.load_state_dict(stored["weights"])
                yield label, seed, network.eval()

"""What is measured of each trained network: distances of test images, certified radii, and what W-PGD leaves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.accuracy import fooled
from benchmarks.shared.data import Images
from benchmarks.shared.files import kept, short_hash
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import DDN, FMN, SharedBudgetPGD
from lightning_wdefense.defenses import GaussianSmoothing
from lightning_wdefense.metrics import distributional_accuracy

STEPS = 100
"""Of each attack."""
SIGMA = 0.5
SAMPLES, SELECTION = 1000, 100
"""Noisy copies of an image that estimate the probability of its class, and that choose the class."""
ALPHA = 0.001
"""Error probability of each certificate."""
ORDERS = (1.0, 2.0)
RADII = {"l2": (0.25, 0.5, 0.75, 1.0, 1.25), "linf": (0.025, 0.05, 0.075, 0.1, 0.15)}
LOSSES: dict[str, dict[str, Any]] = {"ce": {"loss": "ce"}, "margin": {"loss": "margin", "clip": 0.05}}
"""Of W-PGD: the second gains nothing from an image that is misclassified already."""


def distances(network: nn.Module, images: Images, norm: str) -> Tensor:
    """Distances to the decision boundary: the smaller one of FMN's and, in L2, DDN's."""
    threat = ThreatModel(norm=norm)
    found = FMN(threat, steps=STEPS)(network, *images).distances
    return found if norm != "l2" else torch.minimum(found, DDN(threat, steps=STEPS)(network, *images).distances)


def identity(network: nn.Module, images: Images, certified: int) -> str:
    """A short name of all that decides what is measured, so that nothing stale is read for other weights or settings."""
    digest = hashlib.sha256()
    for tensor in (*network.state_dict().values(), *images):
        digest.update(tensor.numpy().tobytes())
    return short_hash([digest.hexdigest(), certified, STEPS, SIGMA, SAMPLES, SELECTION, ALPHA, RADII, sorted(LOSSES)])


def measure(network: nn.Module, images: Images, all_images: Images, certified: int, place: Path) -> dict[str, Any]:
    """Clean accuracy, distances and certified radii (0 where the certified class is wrong), stored beside ``place``."""

    def compute() -> dict[str, Any]:
        # On all test images, which cost nothing: clean accuracies differ by tenths of a point, and 500 images do not show that.
        clean = 1 - float(fooled(network, *all_images).float().mean())
        found: dict[str, Any] = {"clean": clean, "l2": distances(network, images, "l2").tolist()}
        if certified:
            smoothing = GaussianSmoothing(SIGMA, samples=SAMPLES, selection=SELECTION, alpha=ALPHA)
            part = images.first(certified)
            classes, radii = smoothing.certify(network, part.x)
            found["certified"] = torch.where(classes == part.y, radii, 0.0).tolist()
        return found

    return kept(place.with_suffix(f".{identity(network, images, certified)}.json"), compute)


def against_w_pgd(network: nn.Module, images: Images, place: Path) -> dict[str, Any]:
    """The accuracy that the greedy adversary on distances leaves, and W-PGD with the images as one batch, for norms and orders."""

    def compute() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for norm, radii in RADII.items():
            lengths = distances(network, images, norm)
            for p in ORDERS:
                greedy = distributional_accuracy(lengths, radii, p).accuracies.tolist()
                attacked = [min(_w_pgd(network, images, norm, radius, p, loss) for loss in LOSSES) for radius in radii]
                found[f"{norm} W_{p:g}"] = {"greedy": greedy, "w-pgd": attacked}
        return found

    return kept(place.with_suffix(f".{identity(network, images, 0)}.w-pgd.json"), compute)


def _w_pgd(network: nn.Module, images: Images, norm: str, radius: float, p: float, loss: str) -> float:
    threat = ThreatModel(norm=norm, eps=radius)
    moved = SharedBudgetPGD(threat, p=p, steps=STEPS, **LOSSES[loss])(network, *images)
    return 1 - float(fooled(network, moved, images.y).float().mean())

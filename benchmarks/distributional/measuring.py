"""What is measured of each trained network: distances of test images, certified radii, and what W-PGD leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.accuracy import fooled
from benchmarks.shared.data import Images
from benchmarks.shared.files import kept
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import DDN, FMN, SharedBudgetPGD
from lightning_wdefense.defenses import GaussianSmoothing
from lightning_wdefense.metrics import distributional_accuracy

STEPS = 100
"""Of each attack."""
SIGMA = 0.5
SAMPLES, SELECTION = 1000, 100
"""Noisy copies of an image that estimate the probability of its class, and that choose the class."""
ORDERS = (1.0, 2.0)
RADII = {"l2": (0.25, 0.5, 0.75, 1.0, 1.25), "linf": (0.025, 0.05, 0.075, 0.1, 0.15)}
LOSSES: dict[str, dict[str, Any]] = {"ce": {"loss": "ce"}, "margin": {"loss": "margin", "clip": 0.05}}
"""Of W-PGD: the second gains nothing from an image that is misclassified already."""


def distances(network: nn.Module, images: Images, norm: str) -> Tensor:
    """Distances to the decision boundary: the smaller one of FMN's and, in L2, DDN's."""
    threat = ThreatModel(norm=norm)
    found = FMN(threat, steps=STEPS)(network, *images).distances
    return found if norm != "l2" else torch.minimum(found, DDN(threat, steps=STEPS)(network, *images).distances)


def measure(network: nn.Module, images: Images, certified: int, place: Path) -> dict[str, Any]:
    """Clean accuracy, distances and certified radii (0 where the certified class is wrong), stored at ``place``."""

    def compute() -> dict[str, Any]:
        clean = 1 - float(fooled(network, *images).float().mean())
        found: dict[str, Any] = {"clean": clean, "l2": distances(network, images, "l2").tolist()}
        if certified:
            smoothing = GaussianSmoothing(SIGMA, samples=SAMPLES, selection=SELECTION, alpha=0.001)
            part = images.first(certified)
            classes, radii = smoothing.certify(network, part.x)
            found["certified"] = torch.where(classes == part.y, radii, 0.0).tolist()
        return found

    return kept(place, compute)


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

    return kept(place, compute)


def _w_pgd(network: nn.Module, images: Images, norm: str, radius: float, p: float, loss: str) -> float:
    threat = ThreatModel(norm=norm, eps=radius)
    moved = SharedBudgetPGD(threat, p=p, steps=STEPS, **LOSSES[loss])(network, *images)
    return 1 - float(fooled(network, moved, images.y).float().mean())

"""Attacks that are matched on success, and that are told to evade a detector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.accuracy import fooled
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import ATTACKS, Attack, get_attack
from lightning_wdefense.attacks.losses import margin
from lightning_wdefense.detection import Detector

BATCH = 128
"""Samples that are attacked together: an attack on a distribution sees no more than that of it."""


@dataclass(frozen=True)
class Spec:
    """An attack by its name in ``ATTACKS``, its norm, the radius at which the search begins, and its options.

    ``adaptive`` are options for when it has a detector to evade.
    """

    name: str
    norm: str
    first_eps: float
    options: dict[str, Any] = field(default_factory=dict)
    adaptive: dict[str, Any] = field(default_factory=dict)

    @property
    def registered(self) -> bool:
        return self.name in ATTACKS

    def build(self, eps: float, **options: Any) -> Attack:
        return get_attack(self.name, ThreatModel(norm=self.norm, eps=eps), **(self.options | options))


LESS_HIDING = {"weight": 1.0}
"""With a loss of one's own, which does not say what is misclassified, a sample hides before it is, and so may never be."""

SPECS = {
    "pgd-linf": Spec("pgd", "linf", 0.02, {"steps": 40, "loss": "margin"}),
    "pgd-l2": Spec("pgd", "l2", 0.2, {"steps": 40, "loss": "margin"}),
    "wasserstein": Spec(
        "wasserstein", "wasserstein", 0.02, {"steps": 20, "methods": "projected", "restarts": 1, "loss": "margin"}
    ),
    "sinkhorn-linf": Spec("sinkhorn", "linf", 0.02, {"features": "penultimate"}, LESS_HIDING),
    "sinkhorn-l2": Spec("sinkhorn", "l2", 0.2, {"features": "penultimate"}, LESS_HIDING),
}


class Seen(nn.Module):
    """A model whose outputs also hold what detectors read: its inputs and its penultimate features."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> SimpleNamespace:
        features = self.model[:-1](x)
        return SimpleNamespace(inputs=x, features=features, logits=self.model[-1](features))


def observe(model: nn.Sequential, x: Tensor) -> SimpleNamespace:
    """The same without a graph, of any number of samples."""
    with torch.no_grad():
        parts = [Seen(model)(part) for part in x.split(1024)]
    return SimpleNamespace(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def scores(detector: Detector, seen: SimpleNamespace) -> Tensor:
    what = {"inputs": seen.inputs, "features": seen.features, "outputs": seen.logits}[detector.reads]
    return torch.cat([detector.score(part).detach() for part in what.split(512)])


def attack_all(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([attack(model, *part) for part in zip(x.split(BATCH), y.split(BATCH), strict=True)])


def matching_eps(spec: Spec, model: nn.Module, x: Tensor, y: Tensor, target: float, bisections: int) -> float | None:
    """The radius at which the attack breaks this share of the samples; ``None`` if none does."""

    def success(eps: float) -> float:
        return float(fooled(model, attack_all(spec.build(eps), model, x, y), y).float().mean())

    low, high = 0.0, spec.first_eps
    for _ in range(12):
        if success(high) >= target:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (low, middle) if success(middle) >= target else (middle, high)
    return high


class Evading:
    """A loss that keeps samples misclassified and, once they are, lowers a detector's score.

    Args:
        detector: fitted.
        weight: of the score, in units of the loss.
    """

    def __init__(self, detector: Detector, weight: float) -> None:
        self.detector, self.weight = detector, weight

    def __call__(self, outputs: SimpleNamespace, labels: Tensor) -> Tensor:
        detector = self.detector
        what = {"inputs": outputs.inputs, "features": outputs.features, "outputs": outputs.logits}[detector.reads]
        score, loss = detector.score(what), margin(outputs.logits, labels)
        return loss - self.weight * torch.where(loss > 0, score, score.detach())


def evading(
    spec: Spec, eps: float, model: nn.Sequential, detector: Detector, clean: tuple[Tensor, Tensor], weights: list[float]
) -> Iterator[Attack]:
    """The attack at one radius, told to evade the detector at several weights.

    Weights are in units of the spread of the clean margins over that of the clean scores.

    Raises:
        TypeError: if the attack takes no loss of one's own.
    """
    seen = observe(model, clean[0])
    unit = margin(seen.logits, clean[1]).std() / scores(detector, seen).std().clamp_min(1e-12)
    for weight in weights:
        yield spec.build(eps, **spec.adaptive, loss=Evading(detector, weight * float(unit)))

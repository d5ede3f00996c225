"""The losses: functions of two batches of points and their labels, at the settings that the recipes use."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from lightning_wdefense.defenses.discrepancies import SlicedTransport, Transport, paired_l2
from lightning_wdefense.transport import CriticTraining, SinkhornDivergence, SlicedWasserstein, WassersteinCritic

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x, y, labels) -> scalar``, small where the clouds are the same."""
Draw = Callable[[], tuple[Tensor, Tensor, Tensor]]

PAIRED, BY_CLASS = "paired L2", "critic by class"
TRANSPORT = ("Sinkhorn", "Sinkhorn p=1", "sliced", "critic")
"""Class-blind ones, each compared with paired L2."""


class Critic:
    """The gap of a critic that has learned from earlier batches, and learns from this one before it is asked, as in recipe ``critic``.

    Each call starts from the same critic, so that one batch leaves no trace in the next.
    """

    def __init__(self, draw: Draw, updates: int, seed: int, classes: int | None = None) -> None:
        self.classes = classes
        x, y, labels = draw()
        self.training = CriticTraining(WassersteinCritic(x.shape[1], classes=classes, seed=seed))
        for _ in range(updates):
            self.training.update(x.detach(), y.detach(), self._labels(labels))
            x, y, labels = draw()

    def __call__(self, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        training = copy.deepcopy(self.training)
        training.update(x.detach(), y.detach(), self._labels(labels))
        with training.critic.frozen():
            return training.critic.gap(x, y, self._labels(labels))

    def _labels(self, labels: Tensor) -> Tensor | None:
        return None if self.classes is None else labels


def make_loss(name: str, draw: Draw, *, updates: int, seed: int, reference: bool = False) -> Loss:
    """A loss by its name.

    Args:
        name: ``PAIRED``, one of ``TRANSPORT`` or ``BY_CLASS``.
        draw: batches for a critic to learn from.
        updates: how many of them it learns from.
        seed: of a critic.
        reference: for the gradient that counts as true: a critic of other weights that learns twice as long; 16 times as many directions.
    """
    if name in ("critic", BY_CLASS):
        classes = 10 if name == BY_CLASS else None
        return Critic(draw, updates * (2 if reference else 1), seed + 1000 * reference, classes)
    sliced = SlicedWasserstein(n_projections=1024, seed=1) if reference else SlicedWasserstein()
    return {
        PAIRED: paired_l2,
        "Sinkhorn": Transport(),
        "Sinkhorn p=1": Transport(SinkhornDivergence(p=1)),
        "sliced": SlicedTransport(sliced),
    }[name]

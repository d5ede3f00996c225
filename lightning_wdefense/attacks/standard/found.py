"""The worst input of each sample so far, and the base class of the attacks of AutoAttack, which share it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logits_of, predictions

NORMS = ("linf", "l2")
"""The norms that APGD, FAB and Square know."""


class Found:
    """The worst input of each sample so far.

    A sample is lost when all of its elements are misclassified: without dense labels at its first misclassification.
    Lost samples are left alone.

    Args:
        problem: the batch and the model, which runs once, on the clean inputs.

    Attributes:
        data: the worst inputs ``(N, ...)``, in data units.
        labels: class indices ``(N,)``, or ``(N, ...)`` with one label per element.
        logits: the logits of the clean inputs, float32 or float64.
        dense: whether there is one label per element.
        elements: how many elements of each sample have a label that is not ignored, ``(N,)``; 1 without dense labels.
        wrong: how many of them are misclassified, ``(N,)``.
        loss: what decides between inputs that are equal in this, ``(N,)``; larger is worse.
    """

    def __init__(self, problem: Problem) -> None:
        outputs = problem.checked_outputs("ce")
        self.data = problem.data.clone()
        self.labels = hard_labels(class_labels(problem.labels, outputs))
        self.logits = float32_or_better(logits_of(outputs)).detach()
        self.dense = self.labels.ndim > 1
        self.elements = _by_sample(not_ignored(self.labels))
        self.wrong = wrong_elements(outputs, self.labels)
        self.loss = self._no_loss()

    @property
    def open(self) -> Tensor:
        """Indices of the samples that are not lost."""
        return (self.wrong < self.elements).nonzero().squeeze(1)

    def forget_losses(self) -> None:
        """Before another attack, whose losses cannot be compared with these: its inputs replace those that are no worse."""
        self.loss = self._no_loss()

    def _no_loss(self) -> Tensor:
        return torch.full(self.wrong.shape, -torch.inf, device=self.data.device, dtype=self.logits.dtype)

    def keep(self, index: Tensor, data: Tensor, wrong: Tensor, loss: Tensor) -> None:
        """Compare new inputs of the samples ``index`` with the worst so far, and keep the worse ones."""
        loss = loss.to(self.loss.dtype)
        before, level = self.wrong[index], self.loss[index]
        # Of equal losses the later input is kept: the loss of a confident model may round to 0.
        better = (wrong > before) | ((wrong == before) & (loss >= level))
        self.data[index] = torch.where(per_sample(better, data), data, self.data[index])
        self.wrong[index] = torch.where(better, wrong, before)
        self.loss[index] = torch.where(better, loss, level)


class StandardAttack(Attack):
    """An attack that leaves each sample as soon as it is lost, and can go on with what other attacks have left.

    It fits sharded models: while any rank has a sample left, all ranks run the model.
    """

    @abstractmethod
    def run(self, problem: Problem, found: Found) -> None:
        """Attack the samples that are not lost, and note in ``found`` what comes of it."""

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        found = Found(problem)
        self.run(problem, found)
        return found.data


def check_norm(attack: str, threat: ThreatModel) -> None:
    """Refuse a norm that APGD, FAB and Square do not know.

    Raises:
        ValueError: the message says which they know.
    """
    if threat.norm not in NORMS:
        other = ' For "wasserstein" use WassersteinAttack, by name "wasserstein".' * (threat.norm == "wasserstein")
        raise ValueError(
            f"{attack} attacks in norm {' or '.join(map(repr, NORMS))}, not in norm {threat.norm!r}.{other}"
        )


def wrong_elements(outputs: Any, labels: Tensor) -> Tensor:
    """How many elements of each sample are misclassified, ``(N,)``; without dense labels 0 or 1."""
    return _by_sample((predictions(outputs) != labels) & not_ignored(labels))


def _by_sample(mask: Tensor) -> Tensor:
    return mask.flatten(1).sum(1) if mask.ndim > 1 else mask.long()

"""Accuracies by class, and which classes are taken for which under attack."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense.attacks.labels import not_ignored
from lightning_wdefense.attacks.worst_case import WorstCase
from lightning_wdefense.evaluation.samples import Samples
from lightning_wdefense.metrics._states import concatenated

COUNTS = 4
"""Columns of the state: a class, and how many of its labels there are, are right on clean inputs, and are right under all attacks."""


class ClassAccuracies(NamedTuple):
    """Accuracies of each class that has a sample, as columns ``(C,)``.

    Attributes:
        classes: the classes, increasing.
        counts: number of samples of each class; of pixels, for masks.
        clean: share of them that is right on clean inputs, in [0, 1].
        robust: share of them that is right on clean inputs and under every attack, in [0, 1].
    """

    classes: Tensor
    counts: Tensor
    clean: Tensor
    robust: Tensor

    @classmethod
    def of(cls, labels: Tensor, clean_right: Tensor, robust_right: Tensor) -> ClassAccuracies:
        """The accuracies from labels ``(N,)`` and what is right ``(N,)``."""
        rows = _counts(labels, torch.ones_like(labels), clean_right.long(), robust_right.long())
        return cls._of_counts(rows)

    @classmethod
    def _of_counts(cls, rows: Tensor) -> ClassAccuracies:
        classes, counts, clean, robust = rows.cpu().unbind(1)
        return cls(classes, counts, clean / counts, robust / counts)


class ClassCount(NamedTuple):
    """What :class:`ClassCounts` counted.

    Attributes:
        accuracies: the accuracies of each class.
        samples: number of samples with a label that counts.
    """

    accuracies: ClassAccuracies
    samples: int


class ClassCounts(Metric):
    """Counts right labels by class, also where the number of classes is not known. ``compute`` returns a :class:`ClassCount`.

    Args:
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update = True

    samples: Tensor
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        # Flat, because a process without data takes part in gathering them with an empty vector.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, result: WorstCase) -> None:
        """Add a batch."""
        counted = not_ignored(result.labels)
        labels = result.labels[counted]
        self.samples = self.samples + counted.unsqueeze(1).flatten(1).any(1).sum()
        right = (mask[counted].long() for mask in (result.clean == result.labels, result.robust))
        found = _counts(labels, torch.ones_like(labels), *right)
        self.rows = [_counts(*torch.cat([self._held(), found]).unbind(1)).flatten()]

    def compute(self) -> ClassCount:
        """The accuracies of the classes, and the number of samples, of all processes."""
        accuracies = ClassAccuracies._of_counts(_counts(*self._held().unbind(1)))
        return ClassCount(accuracies, int(self.samples))

    def _held(self) -> Tensor:
        return concatenated(self.rows, self.device).long().view(-1, COUNTS)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For the empty list of a process without data torchmetrics would gather floats, but other processes gather integers.
        self.rows = self.rows or [torch.empty(0, dtype=torch.long, device=self.device)]
        super()._sync_dist(*args, **kwargs)


def confusion_of(samples: Samples) -> Tensor:
    """Number of samples by label (rows) and prediction under attack (columns), ``(K, K)``.

    The prediction is ``worst``: the first wrong one, or the label where none was wrong. Predictions of no class (-1) are not counted.
    """
    check_labels(samples)
    labels, worst = samples["label"], samples["worst"]
    classes = int(torch.cat([labels, samples["clean"], worst]).max()) + 1
    seen = not_ignored(labels) & (worst >= 0)
    return torch.bincount(labels[seen] * classes + worst[seen], minlength=classes**2).view(classes, classes)


def accuracies_by_class(samples: Samples) -> ClassAccuracies:
    """The accuracies of each class, from samples with one label each."""
    check_labels(samples)
    seen = not_ignored(samples["label"])
    columns = (samples[name][seen] for name in ("label", "clean_right", "robust_right"))
    return ClassAccuracies.of(*columns)


def check_labels(samples: Samples) -> None:
    """Refuse samples that have several labels each.

    Raises:
        ValueError: if they are masks.
    """
    if "label" not in samples:
        raise ValueError(
            "The samples are masks, with several labels each, so they have no class. Classes are there for one label a sample."
        )


def _counts(classes: Tensor, *columns: Tensor) -> Tensor:
    """Sums of columns ``(N,)`` by class: a row ``(class, sums...)`` for each class."""
    found, places = classes.unique(return_inverse=True)
    sums = [found.new_zeros(len(found)).index_add_(0, places, column) for column in columns]
    return torch.stack([found, *sums], 1)

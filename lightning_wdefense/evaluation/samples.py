"""What an attack did to each sample, as a table of columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_wdefense.attacks import WorstCase
from lightning_wdefense.attacks.labels import not_ignored

Samples = dict[str, Tensor]
"""Columns by name, each ``(N,)`` and on the CPU; one row for each sample."""

NO_ATTACK = -1
"""In ``broken_by``: no attack turned a label of the sample wrong."""

WITHOUT_ATTACK = -2
"""In ``broken_by``: no label of the sample was right on the clean input."""


def samples_of(result: WorstCase, distances: Tensor | None = None) -> Samples:
    """The samples of a batch: the columns that :class:`~lightning_wdefense.evaluation.result.EvaluationResult` lists."""
    labels = result.labels
    counted = _by_sample(not_ignored(labels)).sum(1)
    left = clean_right = result.clean == labels
    broken_by = torch.full_like(counted, NO_ATTACK)
    broken_by[(counted > 0) & ~_by_sample(left).any(1)] = WITHOUT_ATTACK
    for index, predicted in enumerate(result.adversarial.values()):
        fell = _by_sample(left & (predicted != labels)).any(1)
        broken_by[fell & (broken_by == NO_ATTACK)] = index
        left = left & (predicted == labels)
    columns = (
        {"label": labels, "clean": result.clean, "worst": result.worst} if labels.ndim == 1 else {"pixels": counted}
    )
    columns |= {
        "clean_right": _by_sample(clean_right).sum(1) / counted,
        "robust_right": _by_sample(left).sum(1) / counted,
        "broken_by": broken_by,
    }
    if distances is not None:
        columns["distance"] = distances
    return {name: column.detach().cpu() for name, column in columns.items()}


def joined(parts: Sequence[Samples]) -> Samples:
    """All rows of several tables.

    Raises:
        ValueError: if some have one label for each sample and others a mask.
    """
    if len({tuple(part) for part in parts}) > 1:
        raise ValueError(
            "Some batches of the loader have one label for each sample and others several, such as masks: evaluate them apart."
        )
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _by_sample(mask: Tensor) -> Tensor:
    """A mask ``(N, ...)`` with one row for each sample, ``(N, labels)``."""
    return mask.unsqueeze(1).flatten(1)

"""The least and the most robust samples, with their inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense.evaluation.samples import NO_ATTACK, Samples
from lightning_wdefense.metrics._states import concatenated

MAX_DIMENSIONS = 8
"""Number of dimensions that an input may have."""

RANKS, FACTS = 2, 4
"""Columns of the states: what a sample is ranked by, and integers that are kept of it."""


class Example(NamedTuple):
    """A sample that is classified correctly on its clean input.

    Attributes:
        sample: its row in the samples of the result.
        label: its label, which is also the clean prediction.
        adversarial: the class that is predicted on the adversarial input; -1 if the outputs are NaN or infinite.
        broken_by: index of the attack that made it wrong; -1 if none did.
        distance: its distance to the decision boundary in data units; NaN if distances are not measured.
        pair: its clean and its adversarial input ``(2, ...)`` in data units, on the CPU.
    """

    sample: int
    label: int
    adversarial: int
    broken_by: int
    distance: float
    pair: Tensor

    @property
    def clean(self) -> int:
        """The class that is predicted on the clean input."""
        return self.label

    @property
    def inputs(self) -> Tensor:
        """The clean input in data units."""
        return self.pair[0]

    @property
    def attacked(self) -> Tensor:
        """The adversarial input in data units. If no attack made the sample wrong, the result of the last one."""
        return self.pair[1]


class Examples(NamedTuple):
    """The least and the most robust of the samples that are classified correctly on clean inputs. No sample is in both.

    Attributes:
        least: the least robust samples, the least robust one first.
        most: the most robust samples, the most robust one first.
    """

    least: tuple[Example, ...] = ()
    most: tuple[Example, ...] = ()


class ExampleRanking(Metric):
    """Keeps the ``count`` least and the ``count`` most robust samples of each rank, and finds those of all ranks.

    With distances, samples are ranked by distance. Without, the order is that in which they fell: to the first attack, to the second, and
    so on, then to none. Equal ones are ranked by the margin on the adversarial input: the logit of the label minus the largest other.

    Args:
        count: number of samples at each end.
        by_distance: whether distances are measured.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``count`` is below 1; in ``update``, if inputs differ in shape from those before.
    """

    full_state_update = True  # what an update keeps depends on what is held already

    seen: Tensor
    held: Tensor
    shape: Tensor
    ranks: list[Tensor]
    facts: list[Tensor]
    inputs: list[Tensor]

    def __init__(self, count: int, *, by_distance: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if count < 1:
            raise ValueError(f"The number of examples must be at least 1, got {count}.")
        self.count, self.by_distance = count, by_distance
        for state in ("seen", "held"):  # one number of each process
            self.add_state(state, torch.tensor(0), dist_reduce_fx=None)
        self.add_state("shape", torch.zeros(MAX_DIMENSIONS, dtype=torch.long), dist_reduce_fx="max")
        # Flat, because a process without data takes part in gathering them with an empty vector.
        for state in ("ranks", "facts", "inputs"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, samples: Samples, right: Tensor, margins: Tensor, clean: Tensor, attacked: Tensor) -> None:
        """Add a batch.

        Args:
            samples: what happened to the samples of the batch.
            right: which of them are classified correctly on clean inputs, ``(N,)``.
            margins: margins on the adversarial inputs, ``(N,)``.
            clean: clean inputs ``(N, ...)`` in data units.
            attacked: adversarial inputs, of the same shape and units.
        """
        device = self.device
        chosen = right.to(device).nonzero().squeeze(1)
        table = {name: column.to(device)[chosen] for name, column in samples.items()}
        places = chosen + int(self.seen)
        self.seen = self.seen + len(right)
        if not len(chosen):
            return
        broken = table["broken_by"]
        first = table["distance"] if self.by_distance else broken.float().masked_fill(broken == NO_ATTACK, math.inf)
        # Outputs that are not finite have no margin, and nothing is less robust.
        margins = margins.to(device)[chosen].float().nan_to_num(-math.inf, math.inf, -math.inf)
        ranks = torch.stack([first.float(), margins], 1)
        facts = torch.stack([places, table["label"], table["worst"], broken], 1)
        kept = _ends(ranks, self.count)
        pairs = torch.stack([each.to(device)[chosen[kept]].float() for each in (clean, attacked)], 1)
        self._keep(ranks[kept], facts[kept], pairs)

    def skip(self, samples: int) -> None:
        """Count samples of which none is classified correctly on its clean input."""
        self.seen = self.seen + samples

    def compute(self) -> Examples:
        """The least and the most robust samples of all processes."""
        ranks, facts, inputs = self._held()
        seen, held = self.seen.reshape(-1), self.held.reshape(-1)
        before = (seen.cumsum(0) - seen).repeat_interleave(
            held
        )  # samples of the processes before, whose rows come first
        found = []
        for row in _ends(ranks, self.count).tolist():
            place, label, adversarial, broken_by = facts[row].tolist()
            distance = float(ranks[row, 0]) if self.by_distance else math.nan
            pair = inputs[row].cpu().clone()  # the state would be kept with a view of it
            found.append(Example(place + int(before[row]), label, adversarial, broken_by, distance, pair))
        return Examples(tuple(found[: self.count]), tuple(reversed(found[self.count :])))

    def _keep(self, ranks: Tensor, facts: Tensor, inputs: Tensor) -> None:
        """Join samples to those that are held, and keep what is still at the ends."""
        shape = list(inputs.shape[2:])
        if int(self.held) and shape != self._shape():
            raise ValueError(
                f"examples= needs inputs of one shape, got {tuple(shape)} after {tuple(self._shape())}: resize them, or set examples=0."
            )
        self.shape = torch.tensor(shape + [0] * (MAX_DIMENSIONS - len(shape)), device=self.device)
        joined = [torch.cat(pair) for pair in zip(self._held(), (ranks, facts, inputs), strict=True)]
        kept = _ends(joined[0], self.count)
        self.held = torch.full_like(self.held, len(kept))
        self.ranks, self.facts, self.inputs = ([each[kept].flatten()] for each in joined)

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """The samples that are held: ``(M, RANKS)``, ``(M, FACTS)`` and ``(M, 2, ...)``."""
        flat = (concatenated(state, self.device) for state in (self.ranks, self.facts, self.inputs))
        ranks, facts, inputs = flat
        return ranks.view(-1, RANKS), facts.long().view(-1, FACTS), inputs.view(len(facts) // FACTS, 2, *self._shape())

    def _shape(self) -> list[int]:
        return [size for size in self.shape.tolist() if size]

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For the empty list of a process without data torchmetrics would gather floats, but other processes gather integers.
        self.facts = self.facts or [torch.empty(0, dtype=torch.long, device=self.device)]
        super()._sync_dist(*args, **kwargs)


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label minus the largest other one, ``(N,)``, from logits ``(N, K)``; of ignored labels it means nothing."""
    own = labels.clamp_min(0).unsqueeze(1)
    others = logits.scatter(1, own, -math.inf)
    return (logits.gather(1, own).squeeze(1) - others.amax(1)).float()


def _ends(ranks: Tensor, count: int) -> Tensor:
    """The rows with the ``count`` smallest and the ``count`` largest ranks, in increasing order; each once."""
    order = ranks[:, 1].argsort(stable=True)
    order = order[ranks[order, 0].argsort(stable=True)]
    return torch.cat([order[:count], order[max(count, len(order) - count) :]])

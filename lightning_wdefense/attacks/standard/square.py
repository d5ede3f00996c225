"""Square, random search in squares of the image, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.standard.found import Found, StandardAttack, check_norm, wrong_elements
from lightning_wdefense.attacks.standard.windows import MOVES, window_size
from lightning_wdefense.attacks.threat import ThreatModel

SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The queries after each of which the share of the image that a window covers is halved."""
SCHEDULED = 10_000
"""The number of queries that the schedule was published for."""


@dataclass(frozen=True)
class Square(StandardAttack):
    """Random search with the margin loss: tries square windows, smaller and smaller, and keeps what raises the loss.

    It runs the model forwards only, so it also attacks models whose gradients are of no use. A sample is left as soon as
    it is misclassified.

    Images are ``(N, C, H, W)``. Other inputs are laid out as images: a vector is one row, a matrix one channel. Where
    the layout is too narrow for a square, the window is longer.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``).
        queries: number of tries of each run, each a forward pass on the samples that are left.
        p_init: share of the image that the first windows cover.
        rescale_schedule: compress the schedule of 10,000 queries, by which windows get smaller, into ``queries``.
            AutoAttack does not: its 5000 queries are the first half of the schedule.
        restarts: number of runs.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for another norm, or numbers out of range.

    References:
        Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial attack via random
        search", 2020.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> attack = Square(ThreatModel(eps=0.1), queries=20)
        >>> inputs = torch.rand(2, 1, 8, 8)
        >>> adversarial = attack(model, inputs, torch.tensor([0, 2]))
        >>> bool((adversarial - inputs).abs().max() <= 0.1 + 1e-6)
        True
    """

    name: ClassVar[str] = "square"

    threat: ThreatModel
    queries: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm("Square", self.threat)
        check_counts(self, "queries", "restarts")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init must lie between 0 and 1, got {self.p_init}.")

    def run(self, problem: Problem, found: Found) -> None:
        """Attack the samples that are not lost, and note in ``found`` what comes of it."""
        found.forget_losses()
        for _ in range(self.restarts):
            index = found.open
            if not problem.anywhere(len(index) > 0):
                return
            self._search(problem.select(index), found, index)

    def share(self, query: int) -> float:
        """The share of the image that a window covers in this query, counted from 0."""
        if self.rescale_schedule:
            query = query * SCHEDULED // self.queries
        return float(self.p_init / 2 ** sum(query > bound for bound in SCHEDULE))

    def _search(self, problem: Problem, found: Found, index: Tensor) -> None:
        """One run on the samples ``index``, which ``problem`` consists of."""
        make = MOVES[self.threat.norm]
        moves = make(problem)
        # Places are drawn at once, because each single number would synchronise with the device.
        numbers = torch.rand(self.queries, 5, generator=problem.generator, device=problem.generator.device).tolist()
        best, most = moves.start(), found.wrong[index]
        level = torch.full_like(found.loss[index], -torch.inf)
        for query in range(self.queries + 1):
            # The start is tried before the first move.
            size = window_size(self.share(query - 1), *moves.shape[2:], odd=moves.odd)
            tried = best if query == 0 else moves.propose(best, size, numbers[query - 1])
            outputs = problem.outputs(tried.reshape(problem.data.shape))
            loss = problem.loss(outputs, "margin").to(level.dtype)
            wrong = wrong_elements(outputs, found.labels[index])
            better = (wrong > most) | (loss > level)
            rows = better.nonzero().squeeze(1)  # few: most tries are in vain
            best[rows], most[rows], level[rows] = tried[rows], wrong[rows], loss[rows]
            stay = (most < found.elements[index]).nonzero().squeeze(1)
            if len(stay) < len(index) or query == self.queries:
                found.keep(index, best.reshape(problem.data.shape), most, level)
            if not problem.anywhere(len(stay) > 0):
                return
            if len(stay) < len(index):
                problem, index, best, most, level = (
                    problem.select(stay),
                    index[stay],
                    best[stay],
                    most[stay],
                    level[stay],
                )
                moves = make(problem)

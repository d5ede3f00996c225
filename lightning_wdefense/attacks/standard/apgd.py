"""Auto-PGD: projected gradient ascent that chooses its step size by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.labels import likeliest_wrong
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.standard.dlr import dlr, targeted_dlr
from lightning_wdefense.attacks.standard.found import Found, StandardAttack, check_norm, wrong_elements
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

APGDLoss = Literal["ce", "dlr", "dlr-targeted"]
NAMES = {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}
MOMENTUM = 0.25
"""Share of the last move in a move."""


@dataclass(frozen=True)
class APGD(StandardAttack):
    """Auto-PGD: gradient ascent with momentum from a random start, whose step is halved where progress stops.

    At checkpoints, which lie closer and closer, each sample's step is halved if its loss rose in less than a share
    ``rho`` of the steps since the last one, or if its best loss stood still with the same step. It then goes on from its
    best point. A sample is left as soon as it is misclassified, and the model runs on the others only. Samples that are
    never misclassified get the point of the largest loss.

    The targeted attack aims at the likeliest wrong classes one after the other, each time on the samples that are still
    right. It is published for four or more classes. With three, and with two, its loss has another divisor: see
    :func:`~lightning_wdefense.attacks.standard.dlr.targeted_dlr`.

    With dense labels (segmentation) losses are summed over the elements, targets are chosen for each element, and a
    sample keeps the input with the most misclassified elements.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``).
        steps: number of gradient steps of each run.
        loss: ``"ce"``, ``"dlr"`` (difference of logits ratio) or ``"dlr-targeted"``.
        restarts: number of runs from different starts, for each target class.
        rho: the share of steps that must raise the loss, between 0 and 1.
        targets: number of target classes of ``"dlr-targeted"``; fewer if there are not so many wrong classes.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for another norm, an unknown loss, or numbers out of range.

    References:
        Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020.

    Example:
        >>> import torch
        >>> attack = APGD(ThreatModel(norm="l2", eps=0.5), steps=10, loss="dlr-targeted")
        >>> inputs = torch.rand(2, 8)
        >>> adversarial = attack(torch.nn.Linear(8, 5), inputs, torch.tensor([0, 2]))
        >>> bool((adversarial - inputs).norm(dim=1).max() <= 0.5 + 1e-6)
        True
    """

    threat: ThreatModel
    steps: int = 100
    loss: APGDLoss = "ce"
    restarts: int = 1
    rho: float = 0.75
    targets: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm("APGD", self.threat)
        if self.loss not in get_args(APGDLoss):
            raise ValueError(unknown_name("loss of APGD", self.loss, get_args(APGDLoss)))
        check_counts(self, "steps", "restarts", "targets")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho must lie between 0 and 1, got {self.rho}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``"apgd-ce"``, ``"apgd-dlr"`` or ``"apgd-t"``, by the loss."""
        return NAMES[self.loss]

    def run(self, problem: Problem, found: Found) -> None:
        """Attack the samples that are not lost, and note in ``found`` what comes of it."""
        found.forget_losses()
        # Without targets there is one run, whose targets nothing reads.
        order = found.labels.unsqueeze(1)
        if self.loss == "dlr-targeted":
            order = likeliest_wrong(found.logits, found.labels, self.targets)
        for rank in range(order.shape[1]):
            for _ in range(self.restarts):
                index = found.open
                if not problem.anywhere(len(index) > 0):
                    return
                self._ascend(problem.select(index), found, index, order[index, rank])

    def _ascend(self, problem: Problem, found: Found, index: Tensor, targets: Tensor) -> None:
        """One run on the samples ``index``, which ``problem`` consists of."""
        run, checks = (
            _Run.of(found, index, targets, problem.random_point(self.threat.eps), self.threat.eps),
            checkpoints(self.steps),
        )
        for step in range(self.steps + 1):
            last = step == self.steps
            point = run.data.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                outputs = problem.forward(point)
                values = self._losses(problem, outputs, run)
            wrong, level = wrong_elements(outputs, run.labels), values.detach()
            stay = (wrong < run.elements).nonzero().squeeze(1)
            if found.dense or len(stay) < len(wrong):
                found.keep(run.index, run.data, wrong, level)
            if last or not problem.anywhere(len(stay) > 0):
                run.note(level, None)
                break
            gradient = problem.differentiate(values, point, torch.ones_like(values))
            if len(stay) < len(wrong):
                run, problem, level, gradient = run.select(stay), problem.select(stay), level[stay], gradient[stay]
            run.note(level, gradient)
            if step in checks:
                run.halve_where_stuck(self.rho * checks[step])
            self._move(problem, run, momentum=MOMENTUM if step else 0.0)
        if not found.dense:  # of lost samples, which are here if the last step lost them, the lost input is kept
            found.keep(run.index, run.best, torch.zeros_like(run.index), run.best_level)

    def _losses(self, problem: Problem, outputs: Any, run: _Run) -> Tensor:
        if self.loss == "ce":
            return problem.loss(outputs, "ce")
        logits = float32_or_better(logits_of(outputs))
        return dlr(logits, run.labels) if self.loss == "dlr" else targeted_dlr(logits, run.labels, run.targets)

    def _move(self, problem: Problem, run: _Run, momentum: float) -> None:
        """One step of ascent, averaged with the last move; overwrites the gradient."""
        data = problem.project_(problem.step(run.gradient, run.data, run.step).add_(run.data))
        if momentum:
            data.mul_(1 - momentum).add_(run.data, alpha=2 * momentum).sub_(run.previous, alpha=momentum)
            data = problem.project_(data)
        run.previous, run.data = run.data, data


@dataclass
class _Run:
    """The state of the samples of a run; every tensor has one row for each."""

    index: Tensor
    labels: Tensor
    targets: Tensor
    elements: Tensor
    data: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    level: Tensor
    best_level: Tensor
    reference: Tensor
    rises: Tensor
    halved: Tensor
    step: Tensor

    @classmethod
    def of(cls, found: Found, index: Tensor, targets: Tensor, start: Tensor, eps: float) -> _Run:
        """Before the first step, whose length is ``2 * eps``."""
        level = torch.full((len(index),), -torch.inf, dtype=found.loss.dtype, device=start.device)
        return cls(
            index, found.labels[index], targets, found.elements[index],
            data=start, previous=start, gradient=torch.zeros_like(start), best=start, best_gradient=torch.zeros_like(start),
            level=-level, best_level=level, reference=level, rises=torch.zeros_like(index),
            halved=torch.ones_like(index, dtype=torch.bool), step=start.new_full((len(index),), 2 * eps),
        )  # fmt: skip

    def select(self, keep: Tensor) -> _Run:
        """The state of some of the samples, by their positions."""
        return _Run(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def note(self, level: Tensor, gradient: Tensor | None) -> None:
        """Take in the losses and, before another step, the gradient at the current point."""
        improved = level > self.best_level
        rows = per_sample(improved, self.data)
        self.best = torch.where(rows, self.data, self.best)
        self.rises = self.rises + (level > self.level)
        self.best_level, self.level = torch.where(improved, level, self.best_level), level
        if gradient is not None:
            self.best_gradient = torch.where(rows, gradient, self.best_gradient)
            self.gradient = gradient

    def halve_where_stuck(self, enough: float) -> None:
        """At a checkpoint: halve the step of samples whose loss rose in at most ``enough`` steps, or whose best one stood still.

        It has stood still only if the step was not halved at the last checkpoint. These samples go on from their best point.
        """
        stuck = (self.rises <= enough) | (~self.halved & (self.reference >= self.best_level))
        self.step = torch.where(stuck, self.step / 2, self.step)
        rows = per_sample(stuck, self.data)
        self.data = torch.where(rows, self.best, self.data)
        self.gradient = torch.where(rows, self.best_gradient, self.gradient)
        self.halved, self.reference, self.rises = stuck, self.best_level, torch.zeros_like(self.rises)


@lru_cache(maxsize=64)
def checkpoints(steps: int) -> Mapping[int, int]:
    """After which steps of a run progress is checked, and how many steps each check looks back at."""
    period, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, step = {}, period
    while step <= steps:
        found[step] = period
        period = max(period - shorter, least)
        step += period
    return MappingProxyType(found)

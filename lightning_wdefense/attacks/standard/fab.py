"""FAB, the fast adaptive boundary attack: looks for the closest misclassified input."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.attacks.labels import likeliest_wrong
from lightning_wdefense.attacks.norms import per_sample, rows
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.standard.found import Found, StandardAttack, check_norm, wrong_elements
from lightning_wdefense.attacks.standard.hyperplane import shortest_move
from lightning_wdefense.attacks.threat import Box, ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better, logits_of

MOST_BIAS = 0.1
"""Largest weight of the move from the clean input in a step."""
OVERSHOOT = 1.05
"""Length of a step, relative to the way to the linearised boundary."""
BACK = 0.9
"""Where a misclassified input goes back to on the line from the clean input."""


@dataclass(frozen=True)
class FAB(StandardAttack):
    """Fast adaptive boundary attack, targeted: steps onto the linearised boundary to another class, close to the clean input.

    Each step goes to the boundary between the true class and the target, as the gradient of the difference of their
    logits shows it, biased towards its point closest to the clean input. After a misclassification it goes back a
    little, so that the distance shrinks. The likeliest wrong classes are targets one after the other, each time of the
    samples that are still right.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``).
        steps: number of steps for each target class.
        targets: number of target classes; fewer if there are not so many wrong classes.
        restarts: number of runs for each target class, the first from the clean input, the others from random points at
            most ``eps / 2`` away.
        early_exit: leave each sample at its first misclassified input inside the ball. ``False`` looks for the closest
            one, with all steps and targets.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for another norm, or numbers below 1. At the call, for dense labels (segmentation), between which
            there is no one boundary.

    References:
        Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", 2020.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "bias": torch.zeros(2)})
        >>> attack = FAB(ThreatModel(norm="l2", eps=2.0, bounds=None), early_exit=False)
        >>> adversarial = attack(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # 0.7071 from the boundary
        >>> round(float((adversarial - torch.tensor([[1.0, 0.0]])).norm()), 2)
        0.71
    """

    name: ClassVar[str] = "fab-t"

    threat: ThreatModel
    steps: int = 100
    targets: int = 9
    restarts: int = 1
    early_exit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm("FAB", self.threat)
        check_counts(self, "steps", "targets", "restarts")

    def run(self, problem: Problem, found: Found) -> None:
        """Attack the samples that are not lost, and note in ``found`` what comes of it."""
        if found.dense:
            raise ValueError(
                "FAB looks for the boundary between two classes of a sample, but this model has one label per element "
                f"(logits of shape {tuple(found.logits.shape)}): use APGD, or AutoAttack, which leaves FAB out."
            )
        found.forget_losses()
        order = likeliest_wrong(found.logits, found.labels, self.targets)
        everyone = found.open
        for rank in range(order.shape[1]):
            for restart in range(self.restarts):
                index = found.open if self.early_exit else everyone
                if not problem.anywhere(len(index) > 0):
                    return
                self._search(problem.select(index), found, index, order[index, rank], at_random=restart > 0)
        self._judge(problem, found)

    def _judge(self, problem: Problem, found: Found) -> None:
        """Run the model on what the projection into the ball has left of inputs outside."""
        index = found.open
        if problem.anywhere(len(index) > 0):
            part = problem.select(index)
            found.wrong[index] = wrong_elements(part.outputs(found.data[index]), found.labels[index])

    def _search(self, problem: Problem, found: Found, index: Tensor, targets: Tensor, *, at_random: bool) -> None:
        run = _Run(
            index,
            torch.stack([found.labels[index], targets], dim=1),
            problem.data if not at_random else problem.random_point(self.threat.eps / 2),
            problem.data,
            torch.full((len(index),), torch.inf, device=index.device, dtype=problem.data.dtype),
        )
        for _ in range(self.steps):
            point = run.data.detach().requires_grad_()
            pair = float32_or_better(logits_of(problem.forward(point))).gather(1, run.classes)
            lead = pair[:, 1] - pair[:, 0]
            normal = problem.differentiate(lead, point, torch.ones_like(lead))
            run.data = self._step(problem, run.data, -lead.detach().to(normal.dtype), normal)
            fooled = wrong_elements(problem.outputs(run.data), run.classes[:, 0]) > 0
            lost = run.note(fooled, self.threat.ball.length(run.data - problem.data)) <= self.threat.eps
            if self.early_exit and problem.anywhere(bool(lost.any())):
                self._keep(problem, found, run)
                stay = (~lost).nonzero().squeeze(1)
                if not problem.anywhere(len(stay) > 0):
                    return
                run, problem, fooled = run.select(stay), problem.select(stay), fooled[stay]
            back = torch.lerp(problem.data, run.data, BACK)
            run.data = torch.where(per_sample(fooled, back), back, run.data)
        self._keep(problem, found, run)

    def _step(self, problem: Problem, data: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
        """A step from ``data`` to the hyperplane at ``<normal, x - data> = gap``, biased to its point closest to the clean inputs."""
        clean, size = problem.data, len(data)
        away = rows((data - clean) * normal).sum(1)
        low, high = problem.box
        moves = shortest_move(
            torch.cat([data, clean]),
            torch.cat([normal, normal]),
            torch.cat([gap, gap + away]),
            Box(None, None) if low is None or high is None else Box(torch.cat([low, low]), torch.cat([high, high])),
            self.threat.norm,
        )
        length = self.threat.ball.length(moves).clamp_min(1e-8)
        bias = per_sample((length[:size] / (length[:size] + length[size:])).clamp(max=MOST_BIAS), data)
        from_here, from_clean = moves[:size].mul_(OVERSHOOT).add_(data), moves[size:].mul_(OVERSHOOT).add_(clean)
        return problem.box.clamp(torch.lerp(from_here, from_clean, bias))

    def _keep(self, problem: Problem, found: Found, run: _Run) -> None:
        """Note the closest misclassified inputs, or else the latest inputs, projected into the ball."""
        never = run.distance.isinf()
        closest = torch.where(per_sample(never, run.data), run.data, run.closest)
        found.keep(run.index, problem.project(closest), (run.distance <= self.threat.eps).long(), -run.distance)


@dataclass
class _Run:
    """The state of the samples of a search; every tensor has one row for each."""

    index: Tensor
    classes: Tensor
    data: Tensor
    closest: Tensor
    distance: Tensor

    def select(self, keep: Tensor) -> _Run:
        """The state of some of the samples, by their positions."""
        return replace(self, **{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def note(self, fooled: Tensor, distance: Tensor) -> Tensor:
        """Keep the current inputs that are misclassified and closer than all before; the distances ``(N,)`` of the closest ones."""
        closer = fooled & (distance < self.distance)
        self.closest = torch.where(per_sample(closer, self.data), self.data, self.closest)
        self.distance = torch.where(closer, distance, self.distance)
        return self.distance

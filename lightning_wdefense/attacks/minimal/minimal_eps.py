"""The smallest eps at which an attack succeeds, by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.minimal.base import Closest, MinimalAttack
from lightning_wdefense.attacks.norms import BALLS
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel, check_threat


@dataclass(frozen=True)
class MinimalEps(MinimalAttack):
    """The smallest eps at which a bounded attack succeeds on each sample, by bisection.

    The values of eps are those of a fixed grid, ``max_eps / (1 + tolerance)^k``. So samples that need the same eps share one run
    of the attack, and no sample is attacked more often than bisection needs. An adversarial input that lies deeper in its ball
    than eps counts with its own distance, so the search goes on below it.

    Args:
        attack: a bounded attack, such as ``PGD(threat)`` or ``WassersteinAttack(threat)``. Its eps is the first that is tried.
        max_eps: the largest eps, in data units. ``None`` for the diameter of the bounds, or without bounds for 1000 times the eps
            of the attack. For the norm ``wasserstein``, 64 times the eps.
        tolerance: relative distance between neighbouring values of eps.
        min_ratio: the smallest eps as a share of the largest. Samples that fall below it get the smallest eps.
        tightening: number of forward passes that bisect between the clean and the adversarial input at the end, and as many along the
            normal of the boundary there. Not in the norm ``wasserstein``.
        seed: seeds the noise of calls without a generator.

    Raises:
        TypeError: if ``attack`` is not an attack.
        ValueError: if the attack is not bounded, or a number is out of its range.

    In the norm ``wasserstein`` a distance is the eps at which the attack succeeded. In the others it is the length of the
    perturbation, which may be smaller.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import PGD, MinimalEps, ThreatModel
        >>> inputs, labels = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> threat = ThreatModel(norm="linf", eps=1.0, bounds=None)
        >>> found = MinimalEps(PGD(threat, steps=5))(torch.nn.Identity(), inputs, labels)
        >>> [round(distance, 1) for distance in found.distances.tolist()]
        [1.5, 0.0]
    """

    norms: ClassVar[tuple[str, ...]] = (*BALLS, "wasserstein")
    runs_in_lockstep = False

    attack: Attack
    max_eps: float | None = None
    tolerance: float = 0.01
    min_ratio: float = 1e-9
    tightening: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(
                f"MinimalEps needs an attack, such as PGD(threat), got a {type(self.attack).__name__}: {self.attack!r}."
            )
        check_threat(self.attack.threat, type(self).__name__)
        if not self.attack.bounded:
            raise ValueError(
                f"{self.attack.name!r} leaves the threat model's ball, so there is no smallest eps at which it succeeds: use a bounded "
                "attack, such as PGD."
            )
        if not self.threat.eps > 0:
            raise ValueError(
                f"The eps of the attack is the first that is tried, so it must be positive, got {self.threat.eps}."
            )
        if self.max_eps is not None and not (math.isfinite(self.max_eps) and self.max_eps > 0):
            raise ValueError(f"max_eps must be positive and finite (data units), got {self.max_eps}.")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance}.")
        if not 0 < self.min_ratio < 1:
            raise ValueError(f"min_ratio must be between 0 and 1, got {self.min_ratio}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The attack's name after ``"minimal-"``."""
        return f"minimal-{self.attack.name}"

    @property
    def threat(self) -> ThreatModel:  # type: ignore[override]
        """The attack's threat model."""
        return self.attack.threat

    def with_threat(self, threat: ThreatModel) -> MinimalEps:
        """The same search with an attack for another threat model, whose eps is not used."""
        threat = threat.with_eps(self.threat.eps)
        return self if threat == self.threat else replace(self, attack=replace(self.attack, threat=threat))  # type: ignore[type-var]

    def search(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The closest adversarial inputs and their distances, in data units."""
        largest, ratio = self._largest(problem.data), math.log1p(self.tolerance)
        last = math.ceil(
            -math.log(self.min_ratio) / ratio
        )  # the grid is eps = largest * exp(-ratio * index), from 0 to last
        closest = Closest(problem)
        # The smallest eps known to suffice has index ``enough``, the largest known to fail has index ``fails``.
        enough = torch.full((len(problem.data),), -1, device=problem.data.device)
        fails = torch.full_like(enough, last + 1)
        trial = torch.full_like(enough, min(max(round(math.log(largest / self.threat.eps) / ratio), 0), last))
        open_ = torch.ones_like(enough, dtype=torch.bool)
        while bool(open_.any()):
            for index in trial[open_].unique().tolist():
                chosen = (open_ & (trial == index)).nonzero().squeeze(1)
                data, fooled, lengths = self._attacked(problem.select(chosen), largest * math.exp(-ratio * index))
                closest.keep(data, fooled, lengths, chosen)
                reached = (
                    (torch.log(largest / lengths.to(widest(lengths.device))) / ratio).floor().clamp(index, last).long()
                )
                enough[chosen] = torch.where(fooled, torch.maximum(enough[chosen], reached), enough[chosen])
                fails[chosen] = torch.where(fooled, fails[chosen], index)
            open_ = (fails - enough > 1) & (fails > 0) & (enough < last)
            # Until an eps is known to suffice, or to fail, the next is twice or half as large.
            double = max(1, round(math.log(2) / ratio))
            trial = torch.where(enough < 0, (fails - double).clamp_min(0), (enough + fails) // 2)
            trial = torch.where(fails > last, (enough + double).clamp_max(last), trial)
        if self.threat.norm in BALLS:
            closest.tighten(self.tightening)
            closest.straighten(self.tightening)
        return closest.data, closest.distances

    def _largest(self, data: Tensor) -> float:
        threat = self.threat
        if self.max_eps is not None:
            return self.max_eps
        if threat.norm == "wasserstein":
            return 64 * threat.eps
        if threat.bounds is None:
            return 1000 * threat.eps
        corner = torch.full_like(data[:1], threat.bounds[1] - threat.bounds[0])
        return max(float(threat.ball.length(corner)), threat.eps)

    def _attacked(self, problem: Problem, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """The attack's results at one eps: data, which of them fool the model, and their distances."""
        attack = self.attack.with_eps(eps)
        data = problem.box.clamp(attack.perturb(replace(problem, threat=attack.threat)))
        fooled = problem.fooled(problem.outputs(data))
        if self.threat.norm == "wasserstein":
            return data, fooled, torch.full_like(fooled, eps, dtype=data.dtype)
        return data, fooled, self.threat.ball.length(data - problem.data)

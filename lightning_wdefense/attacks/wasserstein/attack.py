"""The attack in the Wasserstein ball of images, by local transport plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.norms import per_sample, random_normal, random_uniform
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.attacks.wasserstein.ascent import ASCENTS, Ascent, Method
from lightning_wdefense.attacks.wasserstein.linear_oracle import best_plan
from lightning_wdefense.attacks.wasserstein.local_transport import (
    LocalTransport,
    check_images,
    check_neighbourhood,
    clamp_rounding,
    square,
)
from lightning_wdefense.attacks.wasserstein.projection import feasible_plan


@dataclass(frozen=True)
class WassersteinAttack(Attack):
    """Moves the mass of pixels to nearby pixels, by transport plans of bounded cost, and stays inside the bounds.

    The pixel values of an image are mass. A local transport plan moves the mass of ``x`` within each channel, at most
    ``neighbourhood // 2`` rows and columns far, and so makes ``x'``. The constraint is ``W_p(x, x') = (sum of mass *
    distance^p / mass of the image)^(1 / p) <= eps``, in pixels. The bounds are a constraint of the same problem: pixels
    above them have multipliers in each step, and the model only gets images inside the bounds. Attacks that clamp
    afterwards lose mass. See :func:`wasserstein_feasibility` for the exact cost of an image.

    Args:
        threat: the threat model (norm ``wasserstein``). ``eps`` is in pixels: 0.1 allows all mass to move by a tenth of
            a pixel, or a tenth of the mass by one pixel. ``bounds`` must begin with 0, the value of a pixel without
            mass, or be ``None``.
        steps: number of steps of each run.
        methods: ``"projected"`` (gradient steps and projections of the plan), ``"frank-wolfe"`` (averages of exact
            solutions of the linearised problem; a step costs a third of the time), or both. Each sample keeps the worst
            result of all runs.
        neighbourhood: side of the square that a pixel's mass may move in, in pixels; odd, usually 3 to 9.
        p: order of the distance, 1 or 2.
        restarts: number of rounds; each round runs all methods. The first round starts from the clean images, the
            others from random plans. With a loss that defines misclassification, later runs attack only the samples
            that are still classified correctly.
        loss: ``"ce"``, ``"margin"``, ``"kl"``, or a callable ``(outputs, labels) -> per-sample loss``; ``None`` for
            cross-entropy in the first round, the margin loss in the second, and so on in turn.
        early_exit: stop early for each sample, at its first misclassification; needs ``loss`` ``None``, ``"ce"`` or
            ``"margin"``.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for another norm, bounds that do not begin with 0, an unknown method or loss, an even neighbourhood,
            or numbers out of range. At the call, for inputs that are not images ``(N, C, H, W)``, are smaller than the
            neighbourhood, have negative pixels or have no mass.

    References:
        Wong, Schmidt, Kolter, "Wasserstein adversarial examples via projected Sinkhorn iterations", ICML 2019 (the
        threat model). Wu, Wang, Yu, "Stronger and faster Wasserstein adversarial attacks", ICML 2020 (both methods,
        without the bounds).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> threat = ThreatModel(norm="wasserstein", eps=0.2)
        >>> inputs = torch.rand(4, 1, 8, 8)
        >>> adversarial = WassersteinAttack(threat, steps=5)(model, inputs, torch.tensor([0, 1, 2, 0]))
        >>> bool((adversarial.sum((1, 2, 3)) - inputs.sum((1, 2, 3))).abs().max() < 1e-3)
        True
    """

    name: ClassVar[str] = "wasserstein"

    threat: ThreatModel
    steps: int = 40
    methods: Sequence[Method] = ("projected", "frank-wolfe")
    neighbourhood: int = 5
    p: int = 1
    restarts: int = 2
    loss: AttackLoss | None = None
    early_exit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "methods", (self.methods,) if isinstance(self.methods, str) else tuple(self.methods))
        if self.loss is not None:
            check_loss(self.loss)
        check_ball(self.threat, self.neighbourhood, self.p)
        for method in self.methods:
            if method not in get_args(Method):
                raise ValueError(unknown_name("method", method, get_args(Method)))
        if not self.methods:
            raise ValueError(f"methods= is empty: name at least one of {', '.join(get_args(Method))}.")
        check_counts(self, "steps", "restarts")
        if self.early_exit and not self._loss_defines_misclassified:
            raise ValueError(
                f'early_exit=True stops at the first misclassification, which loss={self.loss!r} does not define: use loss=None, "ce" '
                'or "margin", or early_exit=False.'
            )

    @property
    def _loss_defines_misclassified(self) -> bool:
        return self.loss in (None, "ce", "margin")

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns its losses, without early exit."""
        return replace(self, loss=outputs_as_losses, early_exit=False) if self._loss_defines_misclassified else None

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        data = clamp_rounding(problem.data, problem.dtype)
        check_images(data, self.neighbourhood)
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        # Work in units in which the largest legal pixel is 1.
        scale = float(data.amax() if self.threat.bounds is None else self.threat.bounds[1])
        images = data / scale
        budget = self.threat.eps**self.p * images.sum((1, 2, 3))
        capacity = None if problem.box.high is None else problem.box.high / scale
        transport = LocalTransport.of(images, budget, capacity, square(self.neighbourhood, self.p))
        found = WorstImages(problem.data.clone(), problem)
        for round_ in range(self.restarts):
            loss = self.loss or ("ce", "margin")[round_ % 2]
            for method in self.methods:
                open_ = (~found.fooled).nonzero().squeeze(1)
                if not problem.anywhere(len(open_) > 0):
                    return found.images
                part = transport.select(open_)
                start = part.identity_plan()
                if round_ > 0 or self.loss == "kl":
                    start = _random_plan(part, problem.generator)
                self._ascend(problem, open_, ASCENTS[method](part, start, self.steps), loss, scale, found)
        return found.images

    def _ascend(
        self, problem: Problem, index: Tensor, ascent: Ascent, loss: AttackLoss, scale: float, found: WorstImages
    ) -> None:
        # Without selection for the whole batch, so that labels of a wrong shape reach the checks.
        part = problem if len(index) == len(problem.data) else problem.select(index)
        for step in range(self.steps + 1):
            images = ascent.transport.transported(ascent.feasible) * scale
            last = step == self.steps
            point = images.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                outputs = part.forward(point)
                values = part.loss(outputs, loss, check=step == 0)
            fooled = (
                part.fooled(outputs) if self._loss_defines_misclassified else torch.zeros_like(values, dtype=torch.bool)
            )
            judged = part.loss(outputs, "margin") if self.loss is None else values
            found.keep(index, images.detach(), fooled, judged.detach())
            if last:
                return
            gradient = part.differentiate(values, point, torch.ones_like(values))
            values = values.detach()
            if self.early_exit and problem.anywhere(bool(fooled.any())):
                stay = (~fooled).nonzero().squeeze(1)
                if not problem.anywhere(len(stay) > 0):
                    return
                index, part, ascent = index[stay], part.select(stay), ascent.select(stay)
                gradient, values = gradient[stay], values[stay]
            ascent.move(gradient, values)


class WorstImages:
    """The worst image of each sample so far: misclassified images before others, then the larger loss."""

    def __init__(self, images: Tensor, problem: Problem) -> None:
        self.images = images
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.loss = torch.full((len(images),), -torch.inf, device=images.device)

    def keep(self, index: Tensor, images: Tensor, fooled: Tensor, loss: Tensor) -> None:
        """Compare new images of the samples ``index`` with the worst so far, and keep the worse ones."""
        loss = loss.to(self.loss.dtype)
        # For equal losses the later image is kept: if the loss of a confident model rounds to 0, the later image is better.
        better = (fooled & ~self.fooled[index]) | ((fooled == self.fooled[index]) & (loss >= self.loss[index]))
        self.images[index] = torch.where(per_sample(better, images), images, self.images[index])
        self.loss[index] = torch.where(better, loss, self.loss[index])
        self.fooled[index] |= fooled


def _random_plan(transport: LocalTransport, generator: torch.Generator) -> Tensor:
    """A random feasible plan: a random step from the identity plan to the best plan for random values."""
    values = random_normal(transport.budget.new_empty(transport.shape), generator)
    share = random_uniform(transport.budget, generator).view(-1, 1, 1)
    return feasible_plan(transport, torch.lerp(transport.identity_plan(), best_plan(transport, values), share))


def check_ball(threat: ThreatModel, size: int, p: int) -> None:
    """Refuse a threat model or a setting that does not define a Wasserstein ball of images.

    Args:
        threat: the threat model.
        size: side of the neighbourhood, in pixels.
        p: order of the distance.

    Raises:
        TypeError: if ``threat`` is not a threat model.
        ValueError: for another norm, bounds that do not begin with 0, an even ``size``, or another ``p`` than 1 or 2.
    """
    check_threat(threat, "A Wasserstein ball")
    if threat.norm != "wasserstein":
        raise ValueError(f'A Wasserstein attack needs ThreatModel(norm="wasserstein"), got norm={threat.norm!r}.')
    if threat.bounds is not None and threat.bounds[0] != 0:
        raise ValueError(
            f"bounds must begin with 0, the value of a pixel without mass, got {threat.bounds}: if the pipeline normalises its images, give "
            "ThreatModel the mean= and std= of that normalisation, and the bounds before it."
        )
    check_neighbourhood(size)
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}.")

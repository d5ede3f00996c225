"""A planted adversarial input that the attack must find."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks.norms import random_normal, rows
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.audit.case import Case
from lightning_wdefense.audit.findings import Finding, Verdict
from lightning_wdefense.audit.views.base import View
from lightning_wdefense.modules.recording import PENULTIMATE, ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager

PROBLEMS, INNER = 24, 200
"""Number of problems, and of harmless points of each."""

FEW, MANY = 0.75, 0.95
"""Shares of the planted inputs below which the check fails and warns."""


class Readouts(NamedTuple):
    """A linear readout of the features for each problem: positive on the planted input, negative on harmless points.

    Attributes:
        anchors: clean inputs of the problems ``(P, D)``, in model units.
        weights: ``(P, F)``.
        offsets: ``(P,)``.
    """

    anchors: Tensor
    weights: Tensor
    offsets: Tensor

    def logits(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Two logits ``(N, 2)`` of each input, by the readout of the nearest anchor, the clean input that it comes from."""
        problem = torch.cdist(rows(inputs).float(), self.anchors).argmin(1)
        value = (features * self.weights[problem]).sum(1) + self.offsets[problem]
        return torch.stack([-value / 2, value / 2], 1)


class Planted(View):
    """The model's features with the readouts in the place of its last layer."""

    def __init__(self, inner: View, features: Features, readouts: Readouts) -> None:
        super().__init__(inner)
        self.features, self.readouts = features, readouts

    def __call__(self, inputs: Tensor) -> Tensor:
        """Two logits ``(N, 2)``; class 1 is the planted one."""
        return self.readouts.logits(inputs.detach(), self.features(inputs))


class Features:
    """The features of a model ``(N, F)`` with their graph: the penultimate ones, or the logits.

    Raises:
        NoFeaturesError: if the penultimate layer does not give one row for each input at each call, in a call as well.
    """

    def __init__(self, case: Case, *, penultimate: bool) -> None:
        self._view = case.base
        self._recorder = ForwardRecorder(case.module, PENULTIMATE) if penultimate else None
        if self._recorder is None:
            return
        example = case.inputs[: case.size]
        try:
            with case.running():
                self._recorder.attach(example, temporary=True)
                self(example)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError):  # neither a linear layer nor a convolution
                raise NoFeaturesError from error
            raise

    def __call__(self, inputs: Tensor) -> Tensor:
        """The features of inputs in model units."""
        if self._recorder is None:
            return self._view(inputs).float()
        with self._recorder.recording() as recording:
            self._view(inputs)
        if not recording.features:  # a random model took another way
            raise NoFeaturesError
        found = self._recorder.rows(recording.features[-1]).float()
        if len(found) != len(inputs):
            raise NoFeaturesError
        return found + 0 * inputs.flatten(1).sum(1, keepdim=True)  # with a graph in any case, as the logits have

    def close(self) -> None:
        """Take the hooks from the model."""
        if self._recorder is not None:
            self._recorder.detach()


class NoFeaturesError(Exception):
    """The model has no layer whose inputs are one row for each sample at each call."""


def planted(case: Case) -> Finding:
    """Whether the claim's attacks find inputs that are known to be there.

    For each of some samples a linear readout of the model's features is fitted that tells one point on the ball's surface from many
    points inside. So an adversarial input exists, and an attack that fails to find it would fail to find others (Zimmermann et al., "Increasing
    confidence in adversarial robustness evaluations", 2022).
    """
    if case.threat.norm == "wasserstein":
        return Finding(
            "planted", "skipped", "norm wasserstein", "Points are planted in balls of L-infinity, L2 and L1."
        )
    try:
        return _found(case, penultimate=True)
    except NoFeaturesError:
        return _found(case, penultimate=False)


def _found(case: Case, *, penultimate: bool) -> Finding:
    name, features = "planted", Features(case, penultimate=penultimate)
    try:
        with eager():
            clean = case.inputs[case.right][:PROBLEMS]
            readouts, kept, chance = _plant(case, features, clean)
            if not bool(kept.any()):
                return Finding(
                    name,
                    "skipped",
                    "no readout tells a point on the surface from those inside",
                    "Nothing can be planted.",
                )
            view, inputs = Planted(case.base, features, readouts), clean[kept]
            labels = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
            found = torch.zeros_like(labels, dtype=torch.bool)
            for attack in case.attacks.values():
                with case.running():
                    noise = seeded_generator(inputs.device, case.seed, 2)
                    moved = attack(view, inputs, labels, generator=noise, samples=~found)
                    found = found | (view(moved).argmax(1) == 1)
    finally:
        features.close()
    share = float(found.float().mean())
    verdict: Verdict = "pass" if share >= MANY else "warn" if share >= FEW else "fail"
    return Finding(
        name,
        verdict,
        f"{', '.join(case.attacks)} found {int(found.sum())} of {len(found)} planted inputs; random points find {chance:.1%}",
        "The attack finds adversarial inputs that are known to be there."
        if verdict == "pass"
        else "Adversarial inputs are known to be there, and the attack does not find them, so it would not find others either.",
        ""
        if verdict == "pass"
        else "The attack is too weak for this model: mend the gradients, or its steps and restarts.",
        share,
    )


def _plant(case: Case, features: Features, clean: Tensor) -> tuple[Readouts, Tensor, float]:
    """Readouts of the samples ``(P, ...)``, which of them tell their points apart, and how often random points hit by chance."""
    threat, generator = case.threat, seeded_generator(clean.device, case.seed, 3)
    weights, offsets, kept, hits = [], [], [], []
    for sample in clean:
        inside, surface, tried = (
            _points(threat, sample, generator, *size) for size in ((INNER, 0.5), (1, None), (INNER, 1.0))
        )
        with case.running(), torch.no_grad():
            near, far, chance = (features(threat.to_model(points)) for points in (inside, surface, tried))
        centre, target = near.mean(0), far[0]
        covariance = torch.cov(near.T).reshape(len(target), len(target))
        ridge = 0.1 * covariance.diagonal().mean() + 1e-12
        weight = torch.linalg.solve(covariance + ridge * torch.eye(len(target), device=clean.device), target - centre)
        highest, value = (near @ weight).max(), target @ weight
        gap = value - highest
        scale = 10 / gap.clamp_min(1e-12)
        weights.append(weight * scale)
        offsets.append(-scale * (0.25 * highest + 0.75 * value))
        kept.append(bool(gap > 1e-6 * value.abs()))
        hits.append(float((chance @ weights[-1] + offsets[-1] > 0).float().mean()))
    found = torch.tensor(kept, device=clean.device)
    if not kept or not any(kept):
        return Readouts(rows(clean).float(), clean.new_zeros(0), clean.new_zeros(0)), found, 0.0
    stacked = Readouts(rows(clean[found]).float(), torch.stack(weights)[found], torch.stack(offsets)[found])
    chance_rate = sum(hit for hit, keep in zip(hits, kept, strict=True) if keep) / sum(kept)
    return stacked, found, chance_rate


def _points(
    threat: ThreatModel, sample: Tensor, generator: torch.Generator, count: int, radius: float | None
) -> Tensor:
    """Points around a sample, in data units: uniform in a ball of ``radius`` times eps, or on the surface (``None``)."""
    data = threat.to_data(sample.unsqueeze(0)).expand(count, *sample.shape)
    if radius is None:
        direction = random_normal(data, generator)
        delta = threat.ball.steepest(direction) * threat.eps
    else:
        delta = threat.ball.uniform(data, radius * threat.eps, generator)
    return threat.box(data).clamp(data + delta)

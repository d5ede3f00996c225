"""Checks of the gradients: are they there, do they point anywhere, and what do operations without gradient hide."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks.losses import margin
from lightning_wdefense.attacks.norms import BALLS, random_uniform, rows
from lightning_wdefense.audit.case import Case
from lightning_wdefense.audit.findings import Finding, Verdict
from lightning_wdefense.audit.views.base import View
from lightning_wdefense.audit.views.noise import Blurred, FixedNoise
from lightning_wdefense.audit.views.straight_through import StraightThrough

NOWHERE, SOME_NOWHERE = 0.2, 0.1
"""Shares of the samples from which on gradients that point nowhere fail and warn."""


def zero_gradients(case: Case) -> Finding:
    """The share of the samples whose margin has no gradient with respect to the inputs, or next to none."""
    lengths = rows(_slopes(case, case.view)[1]).norm(dim=1)[case.right]
    name = "zero-gradients"
    if not len(lengths):
        return _nothing_right(name)
    zero = lengths <= 1e-6 * lengths.median()
    share = float(zero.float().mean())
    verdict: Verdict = "fail" if share >= 0.05 else "warn" if int(zero.sum()) > 1 else "pass"
    return Finding(
        name,
        verdict,
        f"no gradient for {share:.1%} of {len(lengths)} samples",
        "Attacks by gradients have nothing to follow on these samples, so their failure says nothing."
        if verdict != "pass"
        else "The margin of the samples has gradients to follow.",
        "Look in forward for rounding, argmax, detach(), no_grad(), integer types or saturated activations, and attack through them: by "
        "BPDA, a differentiable stand-in or queries."
        if verdict != "pass"
        else "",
        share,
    )


def finite_differences(case: Case) -> Finding:
    """Whether the margin changes along the attack's direction as the gradients say."""
    name = "finite-differences"
    view = FixedNoise(case.base, case.seed) if case.random else case.base
    data, slope = _slopes(case, view)
    ball = BALLS.get(case.threat.norm, BALLS["l2"])
    length = max(0.1 * case.threat.eps, 1e-3) if case.threat.norm in BALLS else 0.05  # below, differences are rounding
    clean = case.threat.to_data(case.inputs)
    moved = case.threat.box(clean).clamp(data + length * ball.steepest(slope.clone()))
    predicted = rows(slope * (moved - data)).sum(1)
    actual = _margin(case, view, moved) - _margin(case, view, data)
    known = case.right & (predicted > 0)
    if not bool(known.any()):
        return Finding(name, "skipped", "no gradients", "Without gradients there is nothing to compare.")
    ratio = (actual / predicted)[known]
    wrong = ~((ratio > 0.2) & (ratio < 5))
    share = float(wrong.float().mean())
    verdict: Verdict = "fail" if share >= NOWHERE else "warn" if share >= SOME_NOWHERE else "pass"
    return Finding(
        name,
        verdict,
        f"gradient more than five times off for {share:.1%} of {int(known.sum())} samples",
        "The gradients do not say how the outputs change, so attacks by gradients go astray."
        if verdict != "pass"
        else "The gradients say how the outputs change.",
        "Look for steps, jumps (k-winners-take-all), noise, and parts that a custom backward, detach() or BPDA passes over; attack a blurred "
        "model, through every part, and by queries."
        if verdict != "pass"
        else "",
        share,
    )


def straight_through(case: Case) -> Finding:
    """What is left once the attack passes through operations without gradient as if they were the identity (BPDA)."""
    name, view = "straight-through", StraightThrough(case.base)
    try:
        with case.running():
            view(case.inputs[: case.size].clone().requires_grad_())
    except (
        Exception
    ) as error:  # the model's own code meets floats where it wants integers, or a graph where it wants none
        return Finding(
            name,
            "skipped",
            f"{type(error).__name__} in the model",
            "The model cannot be passed straight through.",
            "Give the audit a twin.",
        )
    if not view.met:
        return Finding(
            name, "pass", "no operation without gradient was met", "Nothing is rounded, detached or cut off in forward."
        )
    broken = case.breaks(case.gradient_attack(), view)
    what = f"straight through {', '.join(sorted(view.met))}"
    return case.hidden(
        name,
        broken,
        what,
        "The model has parts whose gradients are cut off, and an attack that passes them as the identity breaks it.",
        "Evaluate with the attack going through these parts (BPDA), as this check did: for a purifier PurifiedClassifier(..., bpda=True).",
    )


def rough_surface(case: Case) -> Finding:
    """What is left once the attack follows gradients that are averaged over a small neighbourhood."""
    width = case.inputs[0].numel()
    spread = (case.threat.bounds[1] - case.threat.bounds[0]) if case.threat.bounds else 1.0
    radius = {"linf": 0.25 * case.threat.eps, "l2": 0.5 * case.threat.eps / width**0.5}.get(
        case.threat.norm, 0.02 * spread
    )
    view = Blurred(case.base, case.threat, radius, draws=8, seed=case.seed)
    return case.hidden(
        "rough-surface",
        case.breaks(case.gradient_attack(steps=30), view),
        "blurred",
        "The surface of the loss is rough: single gradients mislead, and their mean does not.",
        "Evaluate with gradients averaged over small noise on the inputs, and with queries (Square).",
    )


def _slopes(case: Case, view: View) -> tuple[Tensor, Tensor]:
    """A point near each sample, where nothing lies on a round value, and the gradient of the margin there; data units."""
    clean = case.threat.to_data(case.inputs)
    noise = random_uniform(clean, seeded_generator(clean.device, case.seed, 1))
    radius = 0.25 * case.threat.eps if case.threat.norm == "linf" else 1e-3
    data = case.threat.box(clean).clamp(clean + (2 * noise - 1) * radius).detach()
    size = case.size if view.accepts_partial_batches else len(case)
    found = []
    with case.running():
        for part, labels in zip(data.split(size), case.labels.split(size), strict=True):
            point = part.clone().requires_grad_()
            loss = margin(view(case.threat.to_model(point)), labels).sum()
            found.append(torch.autograd.grad(loss, point)[0])
    return data, torch.nan_to_num(torch.cat(found), nan=0.0, posinf=0.0, neginf=0.0)


def _margin(case: Case, view: View, data: Tensor) -> Tensor:
    return margin(case.logits(case.threat.to_model(data), view), case.labels)


def _nothing_right(name: str) -> Finding:
    return Finding(name, "skipped", "no sample is classified correctly", "There is nothing to attack.")

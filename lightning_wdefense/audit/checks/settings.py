"""Checks of the claim's own attacks: do they find more with more steps, other steps or more starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_wdefense.attacks import Attack, AutoAttack
from lightning_wdefense.attacks.losses import margin
from lightning_wdefense.audit.case import Case, changed
from lightning_wdefense.audit.findings import Finding, Verdict

RISING, SLOWLY = 0.25, 0.1
"""Shares of the whole rise of the margin that longer attacks add: from these on the loss is still rising."""


def steps(case: Case) -> Finding:
    """Whether the loss still rises at the last steps: what the claim's attack finds with more of them."""
    name = "steps"
    attack = _with(case, "steps")
    if attack is None:
        return _fixed(name, "more steps")
    count: int = attack.steps  # type: ignore[attr-defined]
    more = changed(attack, steps=count * (4 if count < 50 else 2))
    left = case.claimed
    if not bool(left.any()):
        return Finding(name, "pass", "nothing is left to break", "The claim's attacks broke every sample.")
    with torch.no_grad():
        clean, short, long = (
            margin(case.logits(inputs), case.labels)[left].double().mean()
            for inputs in (case.inputs, case.adversarial(attack, None, left), case.adversarial(more, None, left))
        )
    found = case.missed(
        name,
        case.breaks(more),
        f"{attack.name}, {more.steps} steps instead of {count}",  # type: ignore[attr-defined]
        "The attack had not converged: more steps find more.",
        "Give the attack more steps, until more of them change nothing; for a claim use AutoAttack.",
    )
    rise = float(((long - short) / (long - clean).clamp_min(1e-12)).clamp(0, 1)) if long > clean else 0.0
    verdict: Verdict = (
        "fail" if rise >= RISING else "warn" if rise >= SLOWLY and found.verdict == "pass" else found.verdict
    )
    figure = f"{found.figure}; {rise:.1%} of the rise after {count}"
    if verdict != found.verdict:
        meaning, advice = (
            "The loss still rises at the last steps.",
            "Give the attack more steps, until the loss stands still.",
        )
        found = replace(found, verdict=verdict, meaning=meaning, advice=advice)
    return replace(found, figure=figure, value=rise)


def step_size(case: Case) -> Finding:
    """What the claim's attack finds with other step sizes."""
    name = "step-size"
    attack = _with(case, "step_size")
    if attack is None:
        return _fixed(name, "another step size")
    default = 2.5 * case.threat.eps / attack.steps  # type: ignore[attr-defined]
    given = getattr(attack, "step_size", None) or default
    sizes = sorted({default, given / 4, given * 4} - {given})
    broken = torch.zeros_like(case.claimed)
    for size in sizes:
        broken = broken | case.breaks(changed(attack, step_size=size))
    written = ", ".join(f"{size:.2g}" for size in sizes)
    return case.missed(
        name,
        broken,
        f"{attack.name}, step size {written} instead of {given:.2g}",
        "The result depends on the step size, so the claim's was not the right one.",
        "Tune the step size, or leave it out (2.5 eps / steps); APGD chooses it by itself.",
    )


def restarts(case: Case) -> Finding:
    """What the claim's attack finds from other starts."""
    name = "restarts"
    attack = _with(case, "restarts")
    if attack is None:
        return _fixed(name, "more restarts")
    count = attack.restarts + 2  # type: ignore[attr-defined]
    # A targeted attack has other targets in the place of other starts; the first of them find nearly all.
    return case.missed(
        name,
        case.breaks(changed(attack, restarts=count, seed=case.seed + 1, targets=3)),
        f"{attack.name}, {count} restarts instead of {attack.restarts}",  # type: ignore[attr-defined]
        "The result depends on where the attack starts.",
        "Give the attack more restarts, and other losses; for a claim use AutoAttack.",
    )


def _with(case: Case, setting: str) -> Attack | None:
    """The claim's first attack that has a setting; AutoAttack's are the published ones."""
    found = (each for each in case.attacks.values() if hasattr(each, setting) and not isinstance(each, AutoAttack))
    return next(found, None)


def _fixed(name: str, setting: str) -> Finding:
    return Finding(name, "skipped", f"none of the claim's attacks can be given {setting}", "There is nothing to vary.")

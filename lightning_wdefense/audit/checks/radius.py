"""Checks over the radius: accuracy falls as eps grows, and an attack without limits reaches zero."""

from __future__ import annotations

import warnings

from lightning_wdefense.attacks import Attack, AutoAttack
from lightning_wdefense.attacks.losses import margin
from lightning_wdefense.audit.case import FAIL, WARN, Case, strong_attacks
from lightning_wdefense.audit.findings import Finding, Verdict

FACTORS = (0.25, 0.5, 1.0, 2.0)
"""The radii, as multiples of eps."""


def growing_eps(case: Case) -> Finding:
    """Whether accuracy falls as eps grows, each radius attacked for itself."""
    attack = _attack(case)
    found = [_attacked(case, attack, factor * case.threat.eps) for factor in FACTORS]
    shares, margins = zip(*found, strict=True)
    rise = max(later - min(shares[: index + 1]) for index, later in enumerate(shares[1:]))
    written = ", ".join(
        f"{share:.1%} at {factor * case.threat.eps:.3g}" for share, factor in zip(shares, FACTORS, strict=True)
    )
    # At a small eps accuracy may stay, but the margin does not.
    falls = shares[-1] < shares[0]
    moves = falls or margins[-1] > margins[0] or not bool(case.right.any())
    verdict: Verdict = "fail" if rise >= FAIL or not moves else "warn" if rise >= WARN else "pass"
    if verdict == "pass":
        meaning = f"{'Accuracy falls' if falls else 'Accuracy stays, but margins shrink'} as the attacker may do more."
        return Finding("growing-eps", verdict, written, meaning, "", rise)
    return Finding(
        "growing-eps",
        verdict,
        written,
        "Whoever may change more can do no worse, so the attack fails where accuracy rises, or stays, as eps grows.",
        "Look for masked gradients, and for a step size that does not fit the radius.",
        rise,
    )


def unbounded(case: Case) -> Finding:
    """Whether an attack that may do all reaches 0%."""
    threat = case.threat
    if threat.norm == "wasserstein":
        return Finding(
            "unbounded",
            "skipped",
            "norm wasserstein",
            "Moving all mass still leaves its sum, so 0% is not a matter of course.",
        )
    spread = (threat.bounds[1] - threat.bounds[0]) if threat.bounds else 100 * threat.eps
    width = case.inputs[0].numel()
    eps = spread * {"linf": 1.0, "l2": width**0.5, "l1": float(width)}[threat.norm]
    left, _ = _attacked(case, _attack(case), max(eps, threat.eps))
    verdict: Verdict = "pass" if left < WARN else "warn" if left < 0.05 else "fail"
    return Finding(
        "unbounded",
        verdict,
        f"{left:.1%} is left at eps {eps:.3g}",
        "An attacker who may change everything wins."
        if verdict == "pass"
        else "At this radius the attacker may turn any input into any other, so whatever is left shows that the attack fails.",
        "" if verdict == "pass" else "Look for masked gradients, and for too few or too small steps.",
        left,
        left,
    )


def _attack(case: Case) -> Attack:
    """The claim's first attack; for AutoAttack, which takes long, the first one that is as strong as a claim needs."""
    first = next(iter(case.attacks.values()))
    return next(iter(strong_attacks(case.threat).values())) if isinstance(first, AutoAttack) else first


def _attacked(case: Case, attack: Attack, eps: float) -> tuple[float, float]:
    """The accuracy that is left at another eps, and the mean margin of the samples that are right on clean inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "eps=.* is larger than the whole range")
        inputs = case.adversarial(attack.with_eps(eps), None, case.right)
    left = (case.classes(inputs) == case.labels) & case.right
    return case.accuracy(left), float(margin(case.logits(inputs), case.labels)[case.right].double().mean())

"""Checks by other attacks than the claim's: stronger ones, and weaker ones that must not find more."""

from __future__ import annotations

import torch

from lightning_wdefense.attacks import FGSM, Square, WassersteinAttack
from lightning_wdefense.attacks.standard.found import NORMS
from lightning_wdefense.audit.case import Case, strong_attacks
from lightning_wdefense.audit.findings import Finding

QUERIES = 1000
"""Queries of the attack without gradients."""


def stronger_attacks(case: Case) -> Finding:
    """What the strongest attacks by gradients find, with other losses than the claim's."""
    name, broken, ran = "stronger-attacks", case.plain, ["PGD-50"]
    for key, attack in strong_attacks(case.threat).items():
        if attack not in case.attacks.values() or case.random:
            ran.append(key)
            broken = broken | case.breaks(attack, samples=case.claimed & ~broken)
    return case.missed(
        name,
        broken,
        ", ".join(ran),
        "The claim's attacks are too weak for this model.",
        "For a claim use AutoAttack; while training, watch APGD with a targeted loss now and then.",
    )


def single_step(case: Case) -> Finding:
    """Whether one step finds what many have missed."""
    if case.threat.norm == "wasserstein":
        attack, what = WassersteinAttack(case.threat, steps=1, restarts=1), "one step"
        broken = case.breaks(attack)
    else:
        what = "FGSM"
        broken = case.breaks(FGSM(case.threat)) | case.breaks(FGSM(case.threat, loss="margin"))
    return case.hidden(
        "single-step",
        broken,
        what,
        "One step breaks what many steps have left: the loss misleads those who follow it, which is the mark of masked gradients.",
        "Look for what masks the gradients; add one-step, black-box and blurred attacks to the evaluation.",
    )


def black_box(case: Case) -> Finding:
    """Whether queries alone find what attacks with all knowledge have missed."""
    name = "black-box"
    if case.threat.norm not in NORMS:
        return Finding(name, "skipped", f"no black-box attack for norm {case.threat.norm}", "Square knows linf and l2.")
    return case.hidden(
        name,
        case.breaks(Square(case.threat, queries=QUERIES, rescale_schedule=True)),
        f"Square, {QUERIES} queries",
        "An attacker who knows nothing of the model does better than those who know all: the gradients are masked.",
        "Do not trust attacks by gradients on this model; evaluate with more queries, and mend the gradients.",
    )


def transfer(case: Case) -> Finding:
    """Whether attacks on an undefended twin break this model better than attacks on itself."""
    name = "transfer"
    if case.twin is None:
        return Finding(
            name,
            "skipped",
            "no twin was given",
            "A twin is the same architecture, trained without the defence.",
            "Give audit(..., twin=undefended_model), or --twin in the command.",
        )
    broken = torch.zeros_like(case.claimed)
    for attack in (case.gradient_attack(), *strong_attacks(case.threat).values()):
        broken = broken | case.breaks(attack, case.twin)
    return case.hidden(
        name,
        broken,
        "inputs made for the twin",
        "Inputs made for another model break this one where its own gradients do not.",
        "The gradients are masked: attack the twin, and transfer, as a part of the evaluation.",
    )

"""Checks of the outputs: logits or probabilities, the same at every call or not, saturated or not."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lightning_wdefense.audit.case import FAIL, WARN, Case
from lightning_wdefense.audit.findings import Finding, Verdict
from lightning_wdefense.audit.views.base import Logits
from lightning_wdefense.audit.views.noise import FixedNoise, Rescaled
from lightning_wdefense.modules.state.isolation import isolated

MANY = 0.05
"""Share of the samples from which on something that hides gradients fails."""


def logits(case: Case) -> Finding:
    """Whether the outputs are finite logits."""
    assert isinstance(case.base, Logits)
    finite = case.logits(case.inputs, case.base).isfinite().all(1)
    if case.base.activation is not None:
        return Finding(
            "logits",
            "fail",
            f"the outputs are probabilities (a {case.base.activation})",
            "The gradients of a loss of probabilities vanish, so attacks fail and overstate robustness.",
            "Return the logits from forward, also in eval mode. This audit undoes the activation and attacks the logits, as far as float32 "
            "still holds them.",
        )
    if not bool(finite.all()):
        lost = int((~finite).sum())
        return Finding(
            "logits",
            "fail",
            f"NaN or infinite for {lost} of {len(case)} samples",
            "These outputs name no class.",
            "Mend the model.",
        )
    return Finding("logits", "pass", "finite logits", "Losses of attacks are computed from logits.")


def training_mode(case: Case) -> Finding:
    """Whether the model was given in another mode than that in which it is attacked."""
    name, device = "training-mode", case.inputs.device
    some = case.inputs[: case.size]
    found = []
    for evaluation in (True, False):
        with isolated(case.module, device, evaluation=evaluation), torch.no_grad():
            found.append(FixedNoise(case.base, case.seed)(some))
    training = [module for module in case.module.modules() if module.training]
    spread = found[0].std().clamp_min(1e-12)
    if not training or float((found[0] - found[1]).abs().max() / spread) < 1e-3:
        return Finding(
            name, "pass", "eval mode, or no difference", "Attacks run the model in eval mode, as it was given."
        )
    kinds = ", ".join(sorted({type(module).__name__ for module in training if not list(module.children())}))
    accuracies = [float((each.argmax(1) == case.labels[: case.size]).float().mean()) for each in found]
    return Finding(
        name,
        "fail",
        f"given in training mode; clean {accuracies[1]:.1%}, in eval mode {accuracies[0]:.1%}",
        f"Outputs differ in training mode ({kinds}): what is measured there is another model than the one that will be used.",
        "Call model.eval() before you measure. This audit is of the model in eval mode.",
    )


def randomness(case: Case) -> Finding:
    """Whether outputs change from call to call, and whether that hides anything from the claim's attacks."""
    name = "randomness"
    if not case.random:
        return Finding(name, "pass", "the same outputs at every call", "Attacks see the model that is measured.")
    draws = torch.stack([case.classes(case.inputs, case.base) for _ in range(8)])
    flips = float((draws != draws[0]).any(0).float().mean())
    right = (draws == case.labels).float().mean(1)
    attack = case.gradient_attack(steps=30)
    averaged = case.breaks(attack)
    left = case.accuracy(case.claimed & ~averaged)
    noise = FixedNoise(case.base, case.seed)
    fixed_classes = case.classes(case.adversarial(attack, noise, case.right), noise)
    fixed = case.accuracy(case.right & (fixed_classes == case.labels))
    hidden = case.accuracy(averaged)
    verdict: Verdict = "fail" if hidden >= FAIL or flips >= MANY else "warn"
    return Finding(
        name,
        verdict,
        f"{flips:.1%} flip in 8 calls; clean {right.mean():.1%} ± {right.std():.1%}, claimed {case.accuracy(case.claimed):.1%}, "
        f"averaged {left:.1%}, fixed noise {fixed:.1%}",
        "A random model hides its gradients from an attack that draws once, and a sample counts as robust for being lucky once. 'averaged' is "
        "what an attack on the mean over draws leaves of the claim, 'fixed noise' the accuracy of the model with its noise fixed."
        if verdict == "fail"
        else "The outputs are random, but averaging over draws finds next to nothing more.",
        "Attack the mean over draws of the noise (EoT), decide by the mean over draws, and state the accuracy with the noise fixed "
        "beside it. All attacks of this audit average over draws.",
        hidden,
        left,
    )


def saturated_logits(case: Case) -> Finding:
    """Whether the cross-entropy is so flat that its gradients are zero in the model's precision."""
    name = "saturated-logits"
    first, second = case.logits(case.inputs, case.base).topk(2, dim=1).values.T
    flat = (first - second) > -math.log(torch.finfo(torch.float32).tiny)
    share = float((flat & case.right).sum() / case.right.sum().clamp_min(1))
    broken = case.breaks(case.gradient_attack(steps=30, loss="ce"), Rescaled(case.view))
    found = case.hidden(
        name,
        broken,
        "rescaled",
        "The logits are so large that the cross-entropy is flat: its gradients are lost to rounding.",
        "Attack the margin or the DLR loss, or divide the logits by their spread in the attack; do not train with a temperature that the "
        "attack keeps.",
    )
    figure = f"{share:.1%} have a flat cross-entropy; {found.figure}"
    verdict: Verdict = (
        "fail" if share >= MANY else "warn" if share >= WARN and found.verdict == "pass" else found.verdict
    )
    if verdict != found.verdict:
        meaning = "An attack by the cross-entropy has no gradient to follow on these samples."
        advice = "Divide the logits by a constant, or attack the margin or the DLR loss."
        found = replace(found, verdict=verdict, meaning=meaning, advice=advice)
    return replace(found, figure=figure, value=share)

"""What is audited: a model, samples, and the attacks that a claim rests on; and what all attacks have found so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks import APGD, PGD, Attack, ThreatModel, WassersteinAttack
from lightning_wdefense.attacks.registry import Attacks, evaluation_attacks
from lightning_wdefense.attacks.threat import check_threat
from lightning_wdefense.audit.findings import Finding, Verdict
from lightning_wdefense.audit.views.base import View
from lightning_wdefense.audit.views.noise import Averaged
from lightning_wdefense.modules.outputs import predictions
from lightning_wdefense.modules.state.isolation import isolated

WARN, FAIL = 0.01, 0.03
"""Shares of the samples from which on a check warns or fails: so many that the claim counts as robust and are not."""

JUDGES = 16
"""Draws of the noise of a random model over which a sample's class is decided."""


@dataclass
class Case:
    """A model under audit.

    Attributes:
        module: the user's model.
        base: the model as a view: its logits.
        view: what the checks' attacks run: ``base``, or its mean over draws if the model draws random numbers.
        inputs: samples ``(N, ...)`` in model units.
        labels: classes ``(N,)``.
        threat: the threat model.
        attacks: the attacks that the claim rests on.
        twin: an undefended model to transfer attacks from, if there is one.
        random: whether outputs change from call to call.
        size: number of samples in one forward pass.
        seed: seed of all noise.
        right: which samples are classified correctly, ``(N,)``.
        claimed: which of them the claim's attacks leave, ``(N,)``.
        lost: which samples any attack made wrong, ``(N,)``.
    """

    module: nn.Module
    base: View
    view: View
    inputs: Tensor
    labels: Tensor
    threat: ThreatModel
    attacks: Mapping[str, Attack]
    twin: View | None
    random: bool
    size: int
    seed: int
    right: Tensor = field(default_factory=lambda: torch.empty(0))
    claimed: Tensor = field(default_factory=lambda: torch.empty(0))
    lost: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def running(self) -> AbstractContextManager[None]:
        """Context in which the model may be called; afterwards it is as it was."""
        return isolated(self.module, self.inputs.device)

    def logits(self, inputs: Tensor, view: View | None = None) -> Tensor:
        """The logits ``(N, K)`` of a view, by default of the one that is attacked, without a graph."""
        view = view or self.view
        with self.running(), torch.no_grad():
            return torch.cat([view(part) for part in inputs.split(self._size(view))])

    def classes(self, inputs: Tensor, view: View | None = None) -> Tensor:
        """The model's classes ``(N,)``; if it draws random numbers, those of the mean over many draws."""
        if view is None:
            view = Averaged(self.base, JUDGES) if self.random else self.base
        return predictions(self.logits(inputs, view))

    def adversarial(self, attack: Attack, view: View | None = None, samples: Tensor | None = None) -> Tensor:
        """What an attack on a view makes of the samples ``(N, ...)``, in model units; samples that are left out stay as they are."""
        view, found = view or self.view, []
        size = self._size(view)
        chosen = torch.ones_like(self.right) if samples is None else samples
        for index, start in enumerate(range(0, len(self), size)):
            part = slice(start, start + size)
            noise = seeded_generator(self.inputs.device, self.seed, index)
            with self.running():
                found.append(
                    attack(view, self.inputs[part], self.labels[part], generator=noise, samples=chosen[part])
                    if bool(chosen[part].any())
                    else self.inputs[part]
                )
        return torch.cat(found)

    def _size(self, view: View) -> int:
        return self.size if view.accepts_partial_batches else len(self)

    def breaks(self, attack: Attack, view: View | None = None, samples: Tensor | None = None) -> Tensor:
        """Which of the samples that the claim counts as robust an attack on a view makes wrong for the model itself, ``(N,)``."""
        chosen = self.claimed if samples is None else samples & self.right
        if not bool(chosen.any()):
            return torch.zeros_like(chosen)
        wrong = (self.classes(self.adversarial(attack, view, chosen)) != self.labels) & chosen
        self.lost = self.lost | wrong
        return wrong

    def accuracy(self, left: Tensor) -> float:
        """The share of the samples that a mask holds."""
        return float(left.float().mean())

    def gradient_attack(self, steps: int = 50, **options: Any) -> Attack:
        """A plain attack by gradients for the threat model's norm, on the margin: it has gradients where the cross-entropy has none."""
        kind: Callable[..., Attack] = WassersteinAttack if self.threat.norm == "wasserstein" else PGD
        return kind(self.threat, steps=steps, **{"loss": "margin"} | options)

    @cached_property
    def plain(self) -> Tensor:
        """Which samples of the claim plain gradients break, of the margin and of the cross-entropy, ``(N,)``."""
        broken = self.breaks(self.gradient_attack())
        return broken | self.breaks(self.gradient_attack(loss="ce"), samples=self.claimed & ~broken)

    def missed(self, check: str, broken: Tensor, what: str, meaning: str, advice: str, *, by: str = "") -> Finding:
        """The finding of a check that looks for samples which the claim counts as robust and are not.

        Args:
            check: name of the check.
            broken: which samples it broke, ``(N,)``.
            what: the attack.
            meaning: what it means if there are many.
            advice: what to do then.
            by: who else has missed these samples, if ``broken`` is about that.
        """
        count, tried, share = int(broken.sum()), int(self.claimed.sum()), self.accuracy(broken)
        left = self.accuracy(self.claimed & ~broken)
        verdict: Verdict = "fail" if share >= FAIL and count > 1 else "warn" if share >= WARN and count > 1 else "pass"
        figure = f"{what}: {count} of {tried} fall" if tried else f"{what}: nothing is left to break"
        if tried and by:
            figure += f" beyond {by}"
        if count:
            figure += f", {self.accuracy(self.claimed):.1%} to {left:.1%}"
        if verdict == "pass":
            meaning, advice = "It finds nothing, or next to nothing, that was missed before.", ""
        return Finding(check, verdict, figure, meaning, advice, share, left)

    def hidden(self, check: str, broken: Tensor, what: str, meaning: str, advice: str) -> Finding:
        """:meth:`missed`, of samples that plain gradients do not break either: what the model hides from them."""
        return self.missed(check, broken & ~self.plain, what, meaning, advice, by="plain gradients")


def strong_attacks(threat: ThreatModel) -> dict[str, Attack]:
    """The strongest attacks by gradients that are known for a norm: what a claim rests on unless the user says otherwise."""
    if threat.norm == "wasserstein":
        return {"wasserstein": WassersteinAttack(threat)}
    if threat.norm == "l1":
        return {
            "pgd": PGD(threat, steps=100, restarts=2),
            "pgd-margin": PGD(threat, steps=100, restarts=2, loss="margin"),
        }
    return {"apgd-ce": APGD(threat), "apgd-t": APGD(threat, loss="dlr-targeted")}


def claimed_attacks(attacks: Attacks | None, threat: ThreatModel) -> dict[str, Attack]:
    """The attacks that a claim rests on, by name; ``None`` stands for :func:`strong_attacks`.

    Raises:
        TypeError: if something is neither a name nor an attack, or ``threat`` is not a threat model.
        ValueError: if there is no attack, or one is unknown, unbounded or made for another threat model, or eps is 0.
    """
    check_threat(threat, "An audit")
    if threat.eps == 0:
        raise ValueError("An audit needs a positive eps: with eps 0 there is nothing to attack.")
    return evaluation_attacks(strong_attacks(threat) if attacks is None else attacks, threat)


def changed(attack: Attack, **changes: Any) -> Attack:
    """The attack with other settings; unchanged where it has no such setting."""
    there = {name: value for name, value in changes.items() if hasattr(attack, name)}
    return replace(attack, **there)  # type: ignore[type-var]

"""The zoo: a table of broken and of honest defences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from audit.zoo.parts import (
    After,
    Before,
    Shattered,
    Smoothed,
    Winners,
    clamped,
    detached,
    jpeg,
    median,
    noisy,
    purified_without_gradient,
    quantised,
    thermometer,
    through_integers,
    through_numpy,
)
from audit.zoo.training import THREAT, held_out, linear_model, network, trained
from torch import nn

from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD
from lightning_wdefense.audit import AuditReport, audit
from lightning_wdefense.defenses import PurifiedClassifier


@dataclass(frozen=True)
class Exhibit:
    """A model with the claim that is made of it.

    Attributes:
        name: what it is.
        model: makes it, for a seed.
        attacks: what the claim rests on; ``None`` for the audit's own choice.
        fails: checks that must fail; empty for an honest model, of which none may.
        threat: the threat model.
        twin: whether the audit gets the undefended model.
    """

    name: str
    model: Callable[[int], nn.Module]
    fails: tuple[str, ...] = ()
    attacks: Any = None
    threat: ThreatModel = THREAT
    twin: bool = False

    @property
    def broken(self) -> bool:
        return bool(self.fails)

    def audit(self, seed: int = 0, samples: int = 100) -> AuditReport:
        batch = held_out(samples)
        twin = trained(seed=seed) if self.twin else None
        return audit(
            self.model(seed), [batch], self.threat, self.attacks, samples=samples, twin=twin, seed=seed, progress=False
        )

    def told_apart(self, report: AuditReport) -> bool:
        """Whether the audit says what is so: a broken defence fails, by the checks that name its fault, and an honest one does not."""
        return set(self.fails) <= set(report.failed) if self.broken else report.passed


def with_dropout():
    return network(dropout=0.5)


def with_winners():
    return network(Winners)


def with_batch_norm():
    model = network()
    model.insert(1, nn.BatchNorm2d(12))
    return model


PGD40 = {"pgd": PGD(THREAT, steps=40)}

BROKEN = (
    Exhibit("quantised inputs", lambda seed: Before(quantised, trained(seed=seed)), ("zero-gradients", "straight-through")),
    Exhibit("rounding as JPEG does", lambda seed: Before(jpeg, trained(seed=seed)), ("zero-gradients", "straight-through")),
    Exhibit("thermometer code", lambda seed: Before(thermometer, trained(seed=seed)), ("straight-through",)),
    Exhibit("integers", lambda seed: Before(through_integers, trained(seed=seed)), ("straight-through",)),
    Exhibit("clamped to the bounds", lambda seed: Before(clamped, trained(seed=seed)), ("straight-through", "black-box")),
    Exhibit("rounding in NumPy", lambda seed: Before(through_numpy, trained(seed=seed)), ("black-box", "zero-gradients")),
    Exhibit("temperature", lambda seed: After(trained(seed=seed), lambda z: 300 * z), ("saturated-logits",), PGD40),
    Exhibit("noise at inference", lambda seed: Before(noisy(0.3), trained(seed=seed, noise=0.3)), ("randomness",)),
    Exhibit("label smoothing and feature scattering", lambda seed: trained("feature-scattering", seed=seed, smoothing=0.5, epochs=12), ("stronger-attacks",), PGD40),
    Exhibit("probabilities", lambda seed: After(trained(seed=seed), lambda z: z.softmax(1)), ("logits",)),
    Exhibit("too few steps", lambda seed: trained("pgd-at", seed=seed), ("steps",), {"pgd": PGD(THREAT, steps=3, step_size=THREAT.eps / 6)}),
    Exhibit("too small steps", lambda seed: trained(seed=seed), ("step-size",), {"pgd": PGD(THREAT, steps=40, step_size=THREAT.eps / 400)}),
    Exhibit("left in training mode", lambda seed: copy.deepcopy(trained(seed=seed, make=with_dropout)).train(), ("training-mode",)),
    Exhibit("purifier that the attack does not go through", lambda seed: Before(lambda x: x + (purified_without_gradient(x) - x).detach(), trained(seed=seed)), ("straight-through", "finite-differences", "black-box"), PGD40),
    Exhibit("purifier without gradient", lambda seed: Before(purified_without_gradient, trained(seed=seed)), ("straight-through", "zero-gradients")),
    Exhibit("detach in forward", lambda seed: Before(detached, trained(seed=seed)), ("zero-gradients",)),
    Exhibit("k winners", lambda seed: trained(seed=seed, make=with_winners, epochs=12), ("finite-differences",)),
    Exhibit("a backward of its own", lambda seed: Before(Shattered.apply, trained(seed=seed)), ("finite-differences", "black-box")),
    Exhibit("masked gradients, with a twin", lambda seed: Before(Shattered.apply, trained(seed=seed)), ("transfer",), twin=True),
)  # fmt: skip

HONEST = (
    Exhibit("undefended", lambda seed: trained(seed=seed)),
    Exhibit("linear", lambda seed: linear_model(seed)),
    Exhibit("pgd-at", lambda seed: trained("pgd-at", seed=seed)),
    Exhibit("class-transport", lambda seed: trained("class-transport", seed=seed)),
    Exhibit("smoothed, the same noise at every call", lambda seed: Smoothed(trained(seed=seed, noise=0.25), 0.25)),
    Exhibit("purified and attacked through", lambda seed: PurifiedClassifier(Before(median, nn.Identity()), trained(seed=seed))),
    Exhibit("undefended, L2", lambda seed: trained(seed=seed), threat=ThreatModel("l2", 0.8)),
    Exhibit("pgd-at, L1", lambda seed: trained("pgd-at", seed=seed), threat=ThreatModel("l1", 3.0)),
    Exhibit("batch normalisation, trained for long", lambda seed: trained(seed=seed, make=with_batch_norm, epochs=30)),
    Exhibit("pgd-at, claimed by AutoAttack", lambda seed: trained("pgd-at", seed=seed), attacks=["autoattack"]),
)  # fmt: skip

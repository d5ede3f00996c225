"""The zoo: a table of broken and of honest defences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from audit.zoo.parts import (
    After,
    Before,
    Shattered,
    Smoothed,
    Winners,
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
from audit.zoo.training import THREAT, fitted, network, trained
from torch import nn

from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import PurifiedClassifier


@dataclass(frozen=True)
class Exhibit:
    """A model with the claim that is made of it.

    Attributes:
        name: what it is.
        model: makes it.
        attacks: what the claim rests on; ``None`` for the audit's own choice.
        fails: checks of which at least one must fail; empty for an honest model, of which none may.
        threat: the threat model.
        options: further arguments of ``audit``.
    """

    name: str
    model: Callable[[], nn.Module]
    fails: tuple[str, ...] = ()
    attacks: Any = None
    threat: ThreatModel = THREAT
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        return bool(self.fails)


def linear():
    torch.manual_seed(0)
    return fitted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def left_in_training():
    torch.manual_seed(0)
    return fitted(network(dropout=0.5)).train()


def winners():
    torch.manual_seed(0)
    return fitted(network(Winners), epochs=12)


def normalised():
    torch.manual_seed(0)
    model = network()
    model.insert(1, nn.BatchNorm2d(12))
    return fitted(model)


def single_logit():
    """Tells 0 to 4 from 5 to 9, by one logit."""
    return After(trained(), lambda z: z[:, 5:].logsumexp(1) - z[:, :5].logsumexp(1))


PGD40 = {"pgd": PGD(THREAT, steps=40)}

BROKEN = (
    Exhibit("quantised inputs", lambda: Before(quantised, trained()), ("zero-gradients", "straight-through")),
    Exhibit("rounding as JPEG does", lambda: Before(jpeg, trained()), ("zero-gradients", "straight-through")),
    Exhibit("thermometer code", lambda: Before(thermometer, trained()), ("straight-through",)),
    Exhibit("integers", lambda: Before(through_integers, trained()), ("straight-through",)),
    Exhibit("rounding in NumPy", lambda: Before(through_numpy, trained()), ("black-box", "zero-gradients")),
    Exhibit("temperature", lambda: After(trained(), lambda z: 300 * z), ("saturated-logits",), PGD40),
    Exhibit("noise at inference", lambda: Before(noisy(0.3), trained(noise=0.3)), ("randomness",)),
    Exhibit("label smoothing and feature scattering", lambda: trained("feature-scattering", smoothing=0.5, epochs=12), ("stronger-attacks",), PGD40),
    Exhibit("probabilities", lambda: After(trained(), lambda z: z.softmax(1)), ("logits",)),
    Exhibit("too few steps", lambda: trained("pgd-at"), ("steps",), {"pgd": PGD(THREAT, steps=3, step_size=THREAT.eps / 6)}),
    Exhibit("too small steps", lambda: trained(), ("step-size",), {"pgd": PGD(THREAT, steps=40, step_size=THREAT.eps / 400)}),
    Exhibit("left in training mode", left_in_training, ("training-mode",)),
    Exhibit("purifier that the attack does not go through", lambda: Before(lambda x: x + (purified_without_gradient(x) - x).detach(), trained()), ("straight-through", "finite-differences", "black-box"), PGD40),
    Exhibit("purifier without gradient", lambda: Before(purified_without_gradient, trained()), ("straight-through", "zero-gradients")),
    Exhibit("detach in forward", lambda: Before(detached, trained()), ("zero-gradients",)),
    Exhibit("k winners", winners, ("finite-differences", "rough-surface", "black-box")),
    Exhibit("a backward of its own", lambda: Before(Shattered.apply, trained()), ("finite-differences", "black-box")),
    Exhibit("masked gradients, with a twin", lambda: Before(Shattered.apply, trained()), ("transfer",), options={"twin": trained}),
)  # fmt: skip

HONEST = (
    Exhibit("undefended", trained),
    Exhibit("linear", linear),
    Exhibit("pgd-at", lambda: trained("pgd-at")),
    Exhibit("class-transport", lambda: trained("class-transport")),
    Exhibit("smoothed, the same noise at every call", lambda: Smoothed(trained(noise=0.25), 0.25)),
    Exhibit("purified and attacked through", lambda: PurifiedClassifier(Before(median, nn.Identity()), trained())),
    Exhibit("undefended, L2", trained, threat=ThreatModel("l2", 0.8)),
    Exhibit("pgd-at, L1", lambda: trained("pgd-at"), threat=ThreatModel("l1", 3.0)),
    Exhibit("batch normalisation, trained for long", lambda: fitted(normalised(), epochs=30)),
    Exhibit("pgd-at, watched by PGD", lambda: trained("pgd-at"), attacks={"pgd": PGD(THREAT, steps=40, restarts=2)}),
)  # fmt: skip

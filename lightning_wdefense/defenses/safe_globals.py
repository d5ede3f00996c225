"""Register the package's configuration classes, so that checkpoints that hold them load with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch

from lightning_wdefense.attacks import Attack, Execution, MinimalAttack, ThreatModel
from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.defenses.discrepancies import DISCREPANCIES, SlicedTransport, Transport
from lightning_wdefense.defenses.losses.reweighting import SampleReweighting
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.defenses.terms import mean_cross_entropy
from lightning_wdefense.transport import SinkhornDivergence, SlicedWasserstein
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.sliced.options import SlicedOptions

PACKAGE = __name__.split(".")[0]


def configuration_classes() -> list[type]:
    """This package's classes that hold settings only: threat models, all attacks, recipes, and the objects in them."""
    ours = [cls for base in (Attack, MinimalAttack) for cls in _below(base) if cls.__module__.split(".")[0] == PACKAGE]
    discrepancies = [type(it) for it in DISCREPANCIES.values() if type(it).__module__.split(".")[0] == PACKAGE]
    settings = [SinkhornDivergence, SinkhornOptions, SlicedWasserstein, SlicedOptions, Transport, SlicedTransport]
    return list(
        dict.fromkeys(
            [ThreatModel, Execution, Recipe, CriticDiscrepancy, SampleReweighting, *ours, *discrepancies, *settings]
        ),
    )


def register_safe_globals() -> None:
    """Allow ``torch.load(weights_only=True)`` to load them. Loading one sets its attributes and runs no code of this package.

    Besides the classes it allows the pure functions that a recipe computes its loss with, and ``set``, which modules without
    parameters hold.
    """
    functions = [it for it in DISCREPANCIES.values() if isinstance(it, FunctionType)]
    torch.serialization.add_safe_globals([*configuration_classes(), mean_cross_entropy, *functions, set])


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)

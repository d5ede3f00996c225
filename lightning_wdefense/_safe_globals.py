"""Configuration in a checkpoint's hyperparameters can be loaded with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch

from lightning_wdefense.attacks import Attack, Execution, ThreatModel
from lightning_wdefense.defenses import DISCREPANCIES, CriticDiscrepancy, Recipe
from lightning_wdefense.defenses.discrepancies import SlicedTransport, Transport
from lightning_wdefense.defenses.recipe import mean_cross_entropy
from lightning_wdefense.transport import SinkhornDivergence, SlicedWasserstein
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.sliced.options import SlicedOptions

PACKAGE = __name__.split(".")[0]


def configuration_classes() -> list[type]:
    """Our classes that are settings and nothing else: threat models, attacks (those to come as well), recipes and what these hold."""
    ours = [cls for cls in _below(Attack) if cls.__module__.split(".")[0] == PACKAGE]
    discrepancies = [type(it) for it in DISCREPANCIES.values() if type(it).__module__.split(".")[0] == PACKAGE]
    settings = [SinkhornDivergence, SinkhornOptions, SlicedWasserstein, SlicedOptions, Transport, SlicedTransport]
    return list(
        dict.fromkeys([ThreatModel, Execution, Recipe, CriticDiscrepancy, *ours, *discrepancies, *settings]),
    )


def register() -> None:
    """Let torch load them. Loading one sets its attributes and runs no code of ours.

    Beside classes there are the pure functions by which a recipe computes its loss, and ``set``, which modules without parameters hold.
    """
    functions = [it for it in DISCREPANCIES.values() if isinstance(it, FunctionType)]
    torch.serialization.add_safe_globals([*configuration_classes(), mean_cross_entropy, *functions, set])


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)

"""The fields of a recipe that a named recipe can be given anew, with their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks import Attack, Execution
from lightning_wdefense.defenses.discrepancies import Discrepancy


class RecipeChanges(TypedDict, total=False):
    """Fields of :class:`Recipe`, all but its name.

    Type checkers check them in ``Recipe.named("trades", threat, weight=3.0)``, and jsonargparse builds attacks and other objects
    in YAML from them.
    """

    attack: Attack | None
    sees: Literal["clean", "adversarial"]
    discrepancy: str | Discrepancy | None
    weight: float
    features: str
    other_weight: float
    task_loss: Callable[[Any, Any], TensorResult]
    margin_weight: float
    awp: float
    execution: Execution | None
    ramp_steps: bool
    warmup_epochs: float

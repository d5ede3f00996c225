"""Recipes by their names on the command line, with changes, and the candidates that tuning tries for each."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_wdefense import Recipe, ThreatModel

AVERAGED = "+avg"
WEIGHT_FACTORS = (1 / 3, 1.0, 3.0)
KNOB_FACTORS = (0.5, 1.0, 2.0)
KNOBS = ("step_size", "noise", "gamma")
"""Of an attack, in the order in which one is tuned where a recipe has no discrepancy to weigh."""

TUNING: dict[str, list[dict[str, Any]]] = {
    "standard": [{}],
    # Three weights for each of those that act on features; written out, so that they stay what they are if a preset changes.
    **{
        key: [{"weight": w} for w in (0.1, 0.3, 0.9)]
        for key in ("alp-features", "sat-features", "class-transport", "critic")
    },
    "udr": [{}, {"attack.multiplier": 0.5}, {"attack.multiplier_rate": 0.02}],
    "wrm": [{}, {"attack.gamma": 0.02}, {"attack.gamma": 0.2}],
    "sinkhorn-dro": [{}, {"attack.temperature": 0.1}, {"attack.spread": 0.15}],
    "feature-scattering": [{}, {"attack.step_size": 0.15}, {"attack.steps": 3}],
}
"""Candidates of recipes for which the general rule (see ``candidates``) does not do. Keep to three each, the budget of all."""


@dataclass(frozen=True)
class Variant:
    """A recipe's name, and what is changed of it.

    Args:
        label: what it is called in the table: the argument on the command line.
        name: of the recipe.
        changes: to ``Recipe.named``; ``"attack.steps"`` means that field of the attack.
        averaged: whether the weights are averaged over the steps (Lightning's ``EMAWeightAveraging``).
    """

    label: str
    name: str
    changes: Mapping[str, Any]
    averaged: bool = False

    @classmethod
    def parse(cls, argument: str) -> Variant:
        """``"name"``, ``"name:weight=3,attack.steps=7"``, each perhaps with ``"+avg"``.

        Raises:
            ValueError: if it is written in another way.
        """
        name, colon, rest = argument.removesuffix(AVERAGED).partition(":")
        changes = {}
        for change in rest.split(",") if colon else []:
            key, equals, value = (part.strip() for part in change.partition("="))
            if not (key and equals and value):
                raise ValueError(
                    f"{argument!r} should look like name:weight=3,attack.steps=7{AVERAGED}, got {change!r}."
                )
            try:
                changes[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                changes[key] = value
        return cls(argument, name, changes, argument.endswith(AVERAGED))

    @property
    def identity(self) -> dict[str, Any]:
        return {"recipe": self.name, "changes": dict(sorted(self.changes.items())), "averaged": self.averaged}

    @property
    def key(self) -> str:
        """The same for variants that train alike."""
        return variant_key(self.identity)

    def with_changes(self, changes: Mapping[str, Any]) -> Variant:
        """With these changes too, where it has not its own."""
        return replace(self, changes={**changes, **self.changes})

    def recipe(self, threat: ThreatModel) -> Recipe:
        """The recipe, changed.

        Raises:
            ValueError: if the recipe or what is changed does not exist, or a value does not do.
        """
        whole = {key: value for key, value in self.changes.items() if "." not in key}
        try:
            recipe = Recipe.named(self.name, threat, **whole)
            for key in self.changes.keys() - whole:
                recipe = _changed(recipe, key.split("."), self.changes[key])
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{self.label!r} cannot be made with {dict(self.changes)}: {error}") from error
        return recipe


def variant_key(identity: Mapping[str, Any]) -> str:
    return json.dumps([identity["recipe"], identity["changes"], identity["averaged"]])


def settings(identity: Mapping[str, Any]) -> str:
    """The changes in words."""
    return ", ".join(f"{key}={value}" for key, value in identity["changes"].items()) or "preset"


def candidates(variant: Variant, threat: ThreatModel) -> list[Variant]:
    """What tuning tries: three weights of the discrepancy, or three values of the attack's first knob."""
    if variant.name in TUNING:
        grid = TUNING[variant.name]
    else:
        recipe = Recipe.named(variant.name, threat)
        key, base, factors = "weight", recipe.weight, WEIGHT_FACTORS
        if not base:
            key, base, factors = _knob(recipe), 0.0, KNOB_FACTORS
            base = _value(recipe, key) if key else 0.0
        grid = [{key: float(f"{factor * base:.3g}")} if factor != 1 else {} for factor in factors] if key else [{}]
    tried = (variant.with_changes(changes) for changes in grid)
    return list({each.key: each for each in tried}.values())


def _knob(recipe: Recipe) -> str | None:
    return next((f"attack.{name}" for name in KNOBS if _value(recipe, f"attack.{name}")), None)


def _value(recipe: Recipe, key: str) -> float:
    """The knob's value in the preset; 0 if it has none."""
    name, attack = key.removeprefix("attack."), recipe.attack
    value = getattr(attack, name, 0)
    return 2.5 * attack.threat.eps / attack.steps if value is None else float(value)


def _changed(owner: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return replace(owner, **{head: _changed(getattr(owner, head), rest, value) if rest else value})

"""AutoAttack with its published settings, the standard evaluation of robustness claims."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.standard.torchattack import (
    MIN_CLASSES,
    TorchAttack,
    UnitImages,
    _require_bounds,
    _torchattacks,
)
from lightning_wdefense.attacks.threat import ThreatModel

_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce": ("APGD", {"loss": "ce", "steps": 100}),
    "apgd-t": ("APGDT", {"steps": 100}),
    "fab-t": ("FAB", {"multi_targeted": True, "steps": 100}),
    "square": ("Square", {"n_queries": 5000}),
}

PARTS = tuple(_PARTS)
"""Names of AutoAttack's component attacks, in their order."""


def autoattack_part(part: str, threat: ThreatModel, **options: Any) -> TorchAttack:
    """One component attack of AutoAttack with its published settings, by its name in ``PARTS``; options override them."""
    attack, standard = _PARTS[part]
    found = TorchAttack(attack, threat, **standard | options)
    found._name = part
    return found


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB (100 steps each) and Square (5000 queries).

    The component attacks are those of torchattacks, with a fixed seed. Each one attacks only the samples that are still
    classified correctly. torchattacks' own preset runs 10 steps and finds fewer adversarial inputs. The targeted
    attacks aim at the 9 most likely wrong classes, or at all if there are fewer. APGD-T needs at least 4 classes; for
    fewer classes it is left out, with a warning.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``, with bounds).
        steps: number of gradient steps of APGD-CE, APGD-T and FAB-T; the standard is 100.
        queries: number of queries of Square; the standard is 5000.
        seed: seeds all noise of calls without a generator.

    Raises:
        ImportError: if torchattacks is not installed.
        ValueError: if the threat model has no bounds or the norm ``wasserstein``, or ``steps`` or ``queries`` is below
            1.

    References:
        Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(8, 5)
        >>> attack = AutoAttack(ThreatModel(eps=0.05), steps=5, queries=10)
        >>> attack(model, torch.rand(2, 8), torch.tensor([0, 2])).shape
        torch.Size([2, 8])
    """

    name: ClassVar[str] = "autoattack"
    runs_in_lockstep = False

    threat: ThreatModel
    steps: int = 100
    queries: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _torchattacks()
        _require_bounds("AutoAttack", self.threat)
        _ = self.threat.ball
        for name in ("steps", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def parts(self, classes: int) -> list[TorchAttack]:
        """The component attacks for a model with this number of classes, in order; without APGD-T below 4 classes."""
        parts = [
            autoattack_part(
                part, self.threat, **({"n_queries": self.queries} if part == "square" else {"steps": self.steps})
            )
            for part in PARTS
        ]
        if classes < MIN_CLASSES["APGDT"]:
            warnings.warn(
                f"AutoAttack leaves APGD-T out: its loss needs at least {MIN_CLASSES['APGDT']} classes, this model has "
                f"{classes}.",
                stacklevel=2,
            )
            del parts[1]
        return parts

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units; for samples that no component fooled, those of the last component."""
        adversarial = problem.data.clone()
        fooled = problem.fooled(problem.outputs(problem.data))
        for part in self.parts(UnitImages(problem).classes):
            open_ = (~fooled).nonzero().squeeze(1)
            if len(open_) == 0:
                break
            rest = problem.select(open_)
            adversarial[open_] = part.perturb(rest)
            fooled[open_] = rest.fooled(rest.outputs(adversarial[open_]))
        return adversarial

"""AutoAttack with its published settings, the standard evaluation of robustness claims."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.standard.apgd import APGD
from lightning_wdefense.attacks.standard.fab import FAB
from lightning_wdefense.attacks.standard.found import Found, StandardAttack, check_norm
from lightning_wdefense.attacks.standard.square import Square
from lightning_wdefense.attacks.threat import ThreatModel

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Names of AutoAttack's component attacks, in their order."""


@dataclass(frozen=True)
class AutoAttack(StandardAttack):
    """The standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB (100 steps each) and Square (5000 queries).

    The component attacks are :class:`APGD`, :class:`FAB` and :class:`Square`. Each one attacks only the samples that are
    still classified correctly, and leaves each of them as soon as it is misclassified. The targeted attacks aim at the 9
    most likely wrong classes, or at all if there are fewer. Below four classes the loss of the targeted APGD has another
    divisor than the published one.

    With dense labels (segmentation) FAB is left out, with a warning, and a sample keeps the input with the most
    misclassified elements.

    Args:
        threat: the threat model (norm ``linf`` or ``l2``).
        steps: number of gradient steps of APGD-CE, and of APGD-T and FAB-T for each target; the standard is 100.
        queries: number of queries of Square; the standard is 5000.
        targets: number of target classes of APGD-T and FAB-T; the standard is 9.
        seed: seeds all noise of calls without a generator.

    Raises:
        ValueError: for another norm, or numbers below 1.

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

    threat: ThreatModel
    steps: int = 100
    queries: int = 5000
    targets: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm("AutoAttack", self.threat)
        check_counts(self, "steps", "queries", "targets")

    @property
    def parts(self) -> tuple[StandardAttack, ...]:
        """The component attacks, in order."""
        threat, steps, targets = self.threat, self.steps, self.targets
        return (
            APGD(threat, steps),
            APGD(threat, steps, "dlr-targeted", targets=targets),
            FAB(threat, steps, targets),
            Square(threat, self.queries),
        )

    def run(self, problem: Problem, found: Found) -> None:
        """Attack the samples that are not lost, and note in ``found`` what comes of it."""
        for part in self.parts:
            if found.dense and isinstance(part, FAB):
                warnings.warn(
                    "AutoAttack leaves FAB-T out: it needs one label per sample, this model has one per element.",
                    stacklevel=2,
                )
                continue
            if not problem.anywhere(len(found.open) > 0):
                return
            part.run(problem, found)

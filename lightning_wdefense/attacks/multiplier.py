"""Attacks with a Lagrange multiplier that is learned in training, along with the model."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lightning_wdefense.attacks.base import Attack


class LearnedAttack(Attack):
    """An attack with the Lagrange multiplier of its constraint, which training updates by dual ascent.

    Attacks are immutable, so an update makes a new attack: ``attack = replace(attack,
    multiplier=attack.updated_multiplier(displacement))``. Here ``displacement`` is the value of :meth:`displacement` on
    the batch, averaged over all ranks. The multiplier is the whole state, so a checkpoint stores one number.

    Attributes:
        multiplier: Lagrange multiplier of the constraint; 0 means no constraint.

    Example:
        >>> from dataclasses import replace
        >>> from lightning_wdefense.attacks import SoftBallPGD, ThreatModel
        >>> attack = SoftBallPGD(ThreatModel(eps=0.1), multiplier=0.5)
        >>> attack = replace(attack, multiplier=attack.updated_multiplier(0.15))
        >>> round(attack.multiplier, 6)
        0.5001
    """

    multiplier: float

    @abstractmethod
    def displacement(self, inputs: Tensor, adversarial: Tensor) -> Tensor:
        """The displacement that the constraint limits: a scalar in data units.

        Args:
            inputs: clean inputs ``(N, ...)``, in model units.
            adversarial: adversarial inputs ``(N, ...)``, in model units.
        """

    @abstractmethod
    def updated_multiplier(self, displacement: float | Tensor) -> float:
        """The multiplier after one step of dual ascent: it grows if the constraint is violated, and is never negative.

        Args:
            displacement: the measured displacement, in data units.
        """

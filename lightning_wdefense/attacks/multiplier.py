"""Attacks with a multiplier that training learns along with the model."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lightning_wdefense.attacks.base import Attack


class LearnedAttack(Attack):
    """An attack with the Lagrange multiplier of its constraint, which training updates by dual ascent.

    Attacks are frozen, so a step of training is ``attack = replace(attack, multiplier=attack.updated_multiplier(
    displacement))``, where ``displacement`` is what :meth:`displacement` measured on the batch, averaged over all ranks.
    The multiplier is the whole state: a checkpoint keeps this one number.

    Attributes:
        multiplier: price of leaving the ball; 0 is no price at all.
    """

    multiplier: float

    @abstractmethod
    def displacement(self, inputs: Tensor, adversarial: Tensor) -> Tensor:
        """What the constraint measures, a scalar in data units, of clean and adversarial inputs in model units."""

    @abstractmethod
    def updated_multiplier(self, displacement: float | Tensor) -> float:
        """The multiplier after one step of dual ascent: it grows where the constraint is broken, and is never negative."""

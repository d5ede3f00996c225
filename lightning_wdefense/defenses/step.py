"""What a robust training step on a batch is told, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense._ranks import ALONE, Ranks


class StepSettings(NamedTuple):
    """What a robust training step has to know beside the batch.

    Attributes:
        radius: factor on the attack's eps, from 0 to 1 (the warm-up).
        generator: random generator of the attack's noise.
        ranks: the ranks that train the model together.
        measure: whether to measure what the attack did, for the logs.
    """

    radius: float = 1.0
    generator: torch.Generator | None = None
    ranks: Ranks = ALONE
    measure: bool = False


class DefenseOutput(NamedTuple):
    """The result of a robust training step: of a recipe that is bound to a model, or of :meth:`WassersteinDefenseMixin.defend`.

    Attributes:
        loss: the loss to minimise, a scalar: the task loss and the recipe's terms.
        clean_outputs: the model's outputs on the clean inputs; ``None`` if the recipe does not need them.
        adversarial_outputs: the model's outputs on the adversarial inputs; ``None`` if the recipe does not need them.
        adversarial_inputs: the adversarial inputs ``(N, ...)`` in model units; the clean inputs if the recipe has no attack.
        logs: the detached parts of the loss and the current ``eps`` (data units). If asked for, and with a Trainer every
            ``log_every_n_steps``, also accuracies, attack success and transport cost.

    Example:
        >>> DefenseOutput._fields
        ('loss', 'clean_outputs', 'adversarial_outputs', 'adversarial_inputs', 'logs')
    """

    loss: Tensor
    clean_outputs: Any
    adversarial_outputs: Any
    adversarial_inputs: Tensor
    logs: dict[str, Any]

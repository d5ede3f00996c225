"""Run an attack through a module's own step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.recording import ForwardRecorder, Recording
from lightning_wdefense.modules.steps import Noise, Step

Read = Callable[[Recording], Any]


class StepModel:
    """A step as the model of an attack: a callable from perturbed values to losses, or to outputs that were recorded.

    It always runs whole batches, because a step may couple its samples.

    Args:
        step: the step, inside :meth:`Step.repeatable`.
        site: the batch, and the place of the values in it.
        recorder: records the outputs in the step.
        read: returns the model's outputs from a recording; ``None`` to return the step's loss, once for each row.
    """

    accepts_partial_batches = False

    def __init__(self, step: Step, site: PerturbationSite, recorder: ForwardRecorder, read: Read | None = None) -> None:
        self._step, self._site, self._recorder, self._read = step, site, recorder, read
        self.__self__ = step.module  # module_of finds the module here

    def __call__(self, values: Tensor) -> Any:
        """Losses ``(M,)`` or outputs for perturbed values ``(M, ...)``."""
        with self._site.perturbed(values) as batch:
            if self._read is None:
                return required_loss(self._step, batch).expand(len(values))
            with self._recorder.recording() as recording:
                self._step(batch)
            return self._read(recording)


def required_loss(step: Step, batch: Any) -> Tensor:
    """The step's loss for a batch.

    Raises:
        ValueError: if the step returns no loss.
    """
    loss = step.loss(batch)
    if loss is None:
        raise ValueError(
            f"{step.name} of {type(step.module).__name__} returned a loss for the clean batch, but no loss for the adversarial batch: return "
            "the loss as a tensor, or as the 'loss' of a dictionary."
        )
    return loss


def attack_step(
    attack: Attack,
    step: Step,
    site: PerturbationSite,
    *,
    noise: Noise,
    recorder: ForwardRecorder,
    read: Read | None,
    labels: Any = None,
    generator: torch.Generator | None = None,
    execution: Execution | None = None,
) -> Tensor:
    """Run an attack on a batch through a module's step.

    An attack that maximises a loss maximises the step's own loss, which is one number for the whole batch. An attack
    that needs outputs (``"kl"``, a callable loss, feature scattering) gets the outputs that ``read`` finds in the step.

    Args:
        attack: the attack; its ``eps`` is used with the site's threat model.
        step: the step.
        site: the batch, and the values in it to perturb.
        noise: how the step is run, see :meth:`Step.repeatable`.
        recorder: records the outputs in the step.
        read: returns the outputs from a recording; ``None`` if there are none.
        labels: labels for losses of outputs.
        generator: random generator for all noise; ``None`` for one seeded with the attack's seed.
        execution: how the model is run; a step is never compiled.

    Returns:
        The perturbed values, in the shape of ``site.values``.

    Raises:
        ValueError: if the attack needs outputs, and there are none.
    """
    own = replace(attack, threat=site.threat.with_eps(attack.threat.eps)).of_losses()  # type: ignore[type-var]
    if own is None and read is None:
        raise ValueError(
            f"The attack {attack.name!r} with loss={getattr(attack, 'loss', None)!r} needs the model's outputs, and those of "
            f"{type(step.module).__name__} could not be found in its {step.name}: say where they are with model= (a submodule that is called "
            'on the whole batch) and outputs= (key, position or callable), or choose a recipe that uses only the step\'s own loss, such as "pgd-at".'
        )
    if execution is not None and execution.compile:
        execution = replace(execution, compile=False)
    with step.repeatable(site.values.device, noise):
        model = StepModel(step, site, recorder, None if own is not None else read)
        used = own or replace(attack, threat=site.threat.with_eps(attack.threat.eps))  # type: ignore[type-var]
        return used(model, site.values, labels, generator=generator, execution=execution)

"""An attack on what a module's own step computes of a batch."""

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
    """A step as the model of an attack: a callable from values of a site to losses, or to outputs that were seen in it.

    It is whole: a step couples its samples as it likes, so no part of a batch is ever run.

    Args:
        step: the step, in a rehearsal.
        site: the batch, and where the values go.
        read: what it returns, of what was recorded; ``None`` for the step's own loss, the same for each row.
        recorder: records outputs and features.
    """

    accepts_partial_batches = False

    def __init__(self, step: Step, site: PerturbationSite, recorder: ForwardRecorder, read: Read | None = None) -> None:
        self._step, self._site, self._recorder, self._read = step, site, recorder, read
        self.__self__ = step.module  # by which the module behind a callable is known

    def __call__(self, values: Tensor) -> Any:
        """Losses ``(M,)`` or outputs."""
        with self._site.perturbed(values) as batch:
            if self._read is None:
                return required_loss(self._step, batch).expand(len(values))
            with self._recorder.recording() as recording:
                self._step(batch)
            return self._read(recording)


def required_loss(step: Step, batch: Any) -> Tensor:
    """The step's loss of a batch.

    Raises:
        ValueError: if it returns none.
    """
    loss = step.loss(batch)
    if loss is None:
        raise ValueError(
            f"{step.name} of {type(step.module).__name__} returned no loss for an attacked batch, though it did for a clean one: return "
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
    """The values that the attack finds for a batch through a module's step.

    An attack that climbs a loss climbs the step's own, as one number of the whole batch; one that reads outputs (``"kl"``, a loss of your
    own, feature scattering) reads what ``read`` finds of them in the step.

    Args:
        attack: for the site's threat, or the one that the site was made for.
        step: the step.
        site: the batch.
        noise: how the step is run, see :meth:`Step.rehearsal`.
        recorder: records outputs.
        read: finds the outputs in what was recorded; ``None`` where none can be found.
        labels: for losses that read outputs.
        generator: source of noise.
        execution: how the model is run; a step is not compiled.

    Raises:
        ValueError: if the attack reads outputs, and there are none to be read.
    """
    own = replace(attack, threat=site.threat.with_eps(attack.threat.eps)).of_losses()  # type: ignore[type-var]
    if own is None and read is None:
        raise ValueError(
            f"The attack {attack.name!r} with loss={getattr(attack, 'loss', None)!r} reads the model's outputs, and those of "
            f"{type(step.module).__name__} could not be found in its {step.name}: say where they are with model= (a submodule that is called "
            'on the whole batch) and outputs= (key, position or callable), or choose a recipe that only climbs the step\'s own loss, such as "pgd-at".'
        )
    if execution is not None and execution.compile:
        execution = replace(execution, compile=False)
    with step.repeatable(site.values.device, noise):
        model = StepModel(step, site, recorder, None if own is not None else read)
        used = own or replace(attack, threat=site.threat.with_eps(attack.threat.eps))  # type: ignore[type-var]
        return used(model, site.values, labels, generator=generator, execution=execution)

"""An evaluation batch as monitors attack and observe it: by plain forward passes, or through the module's own step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import Look
from lightning_wdefense.attacks.steps.sites import Site
from lightning_wdefense.attacks.steps.step_attack import StepModel, attack_step
from lightning_wdefense.modules.outputs import Picked, picking
from lightning_wdefense.modules.recording import OUTPUTS, PENULTIMATE, ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager, isolated
from lightning_wdefense.modules.steps import Step

Observed = list[tuple[Any, Tensor]]


class AttackedBatch:
    """A batch under evaluation.

    Attributes:
        site: the batch, and what the adversary moves in it.
        inputs: what the adversary moves, ``(N, ...)``.
        labels: of the batch.
        model: a callable from inputs to outputs, which attacks are given, inside of :meth:`ready`.
        classifies: whether the labels are classes of the outputs; otherwise there is only the step's loss.
        has_outputs: whether outputs are seen at all.
    """

    site: Site
    labels: Any
    model: Callable[[Tensor], Any]
    classifies: bool = True
    has_outputs: bool = True

    @property
    def inputs(self) -> Tensor:
        """What the adversary moves."""
        return self.site.values

    def ready(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model may be called."""
        return contextlib.nullcontext()

    def fitted(self, attack: Attack) -> Attack:
        """The attack in the units of the inputs."""
        threat = self.site.threat.with_eps(attack.threat.eps)
        return attack if attack.threat == threat else replace(attack, threat=threat)  # type: ignore[type-var]

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """The outputs and features ``(N, D)`` of passes in eval mode that leave no trace."""
        raise NotImplementedError


class ModelBatch(AttackedBatch):
    """A batch that a plain forward pass takes.

    Args:
        model: takes the inputs and returns logits.
        site: the batch.
        labels: of the batch.
        outputs: finds the logits in what the model returns.
        takes_parts: whether the model may be run on a part of a batch.
    """

    def __init__(
        self, model: nn.Module, site: Site, labels: Any, outputs: Any = None, *, takes_parts: bool = True
    ) -> None:
        self._module, self._pick = model, picking(outputs)
        self.site, self.labels = site, labels
        plain = self._pick is None and takes_parts
        self.model = model if plain else Picked(model, self._pick, takes_parts=takes_parts)

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """Where ``"penultimate"`` features are wanted of a model without a linear layer, its outputs are taken, with a warning."""
        recorder = ForwardRecorder(self._module, features, self._pick)
        try:
            recorder.attach(batches[0], temporary=True)
        except ValueError:
            if features != PENULTIMATE:
                raise
            rank_zero_warn("The model runs no nn.Linear, so its outputs are taken for features.")
            return self.observe(OUTPUTS, *batches)
        try:
            with isolated(self._module, batches[0].device), eager():
                return [recorder.observe(batch.detach().clone()) for batch in batches]  # the model may work in place
        finally:
            recorder.detach()


class StepBatch(AttackedBatch):
    """A batch that the module's own step takes.

    Args:
        step: whose loss is climbed.
        site: the batch.
        labels: of the batch.
        look: what a first look at the step saw.
        model: whose outputs are the logits, where it ran.
        outputs: finds the logits in what the model returns.
    """

    def __init__(self, step: Step, site: Site, labels: Any, look: Look, model: nn.Module, outputs: Any = None) -> None:
        self.step, self.site, self.labels, self.look = step, site, labels, look
        self._module, self._pick = model, picking(outputs)
        self.classifies = look.outputs is not None and look.by_sample
        self.has_outputs = look.model_ran > 0
        self._recorder = self._recorded(OUTPUTS)
        self.model = StepModel(step, site, self._recorder, self._read if self.classifies else None)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """A rehearsal of the step, in which its outputs are seen."""
        with eager():
            self._recorder.attach(self._run, temporary=True, head=self.look.outputs == "head")
            try:
                with self.step.rehearsal(self.inputs.device, self.look.noise):
                    yield
            finally:
                self._recorder.detach()

    def attack(self, attack: Attack, generator: torch.Generator) -> Tensor:
        """The values at which the attack finds the step's own loss to be largest."""
        with eager():
            return attack_step(
                attack,
                self.step,
                self.site,
                noise=self.look.noise,
                recorder=self._recorder,
                read=(lambda recording: recording.outputs[0]) if self.has_outputs else None,
                labels=self.labels,
                generator=generator,
            )

    def loss(self, values: Tensor) -> float:
        """The step's own loss at these values."""
        with self.site.moved(values) as batch, torch.enable_grad():  # by its graph a logged loss is known
            loss = self.step.loss(batch)
        return float("nan") if loss is None else float(loss.detach())

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """The outputs and features of the step's passes; where the layer ran several times, the first rows."""
        recorder, found = self._recorded(features), []
        try:
            recorder.attach(self._run, temporary=True, head=self.look.outputs == "head")
            for values in batches:
                with (
                    self.site.moved(values.detach().clone()) as batch,
                    recorder.recording() as recording,
                    torch.no_grad(),
                ):
                    self.step(batch)
                outputs = self._read(recording)
                if features == OUTPUTS:
                    rows = outputs.flatten(1) if isinstance(outputs, Tensor) else torch.empty(len(values), 0)
                else:
                    rows = recorder.rows(recording.features[0])
                found.append((outputs, rows.detach()))
        finally:
            recorder.detach()
        return found

    def _recorded(self, features: str) -> ForwardRecorder:
        return ForwardRecorder(self._module, features, self._pick)

    def _run(self) -> None:
        with self.step.rehearsal(self.inputs.device, self.look.noise), self.site.moved(self.inputs) as batch:
            self.step(batch)

    def _read(self, recording: Any) -> Any:
        if self.look.outputs == "head":
            return recording.heads[-1]
        if not recording.outputs:
            return None
        return recording.outputs[0] if self.look.pick is None else self.look.pick(recording.outputs[0])

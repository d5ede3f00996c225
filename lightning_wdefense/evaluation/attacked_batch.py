"""Evaluation batches that can be attacked, by plain forward passes or through the module's own step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense._ranks import Ranks
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import StepInspection
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.attacks.steps.step_attack import StepModel, attack_step
from lightning_wdefense.modules.outputs import PickedOutputModel, output_picker
from lightning_wdefense.modules.parallel import lockstep
from lightning_wdefense.modules.recording import OUTPUTS, PENULTIMATE, ForwardRecorder
from lightning_wdefense.modules.state.isolation import eager, isolated
from lightning_wdefense.modules.steps import Step

Observed = list[tuple[Any, Tensor]]


class AttackedBatch:
    """An evaluation batch that attacks can run on.

    Attributes:
        site: the batch, and the values in it that the attack perturbs.
        inputs: the values that the attack perturbs, ``(N, ...)``.
        labels: labels of the batch.
        model: a callable from inputs to outputs, for the attacks; to be called inside :meth:`ready`.
        classifies: whether the labels are classes of the outputs. If not, only the step's loss can be attacked.
        has_outputs: whether the model's outputs are recorded.
    """

    site: PerturbationSite
    labels: Any
    model: Callable[[Tensor], Any]
    classifies: bool = True
    has_outputs: bool = True
    _module: nn.Module

    @property
    def ranks(self) -> Ranks:
        """The ranks that must run the model equally often."""
        return lockstep(self._module)

    @property
    def inputs(self) -> Tensor:
        """The values that the attack perturbs, ``(N, ...)``."""
        return self.site.values

    def ready(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the model may be called."""
        return contextlib.nullcontext()

    def fitted(self, attack: Attack) -> Attack:
        """The attack with a threat model in the units of the perturbed values."""
        threat = self.site.threat.with_eps(attack.threat.eps)
        return attack if attack.threat == threat else replace(attack, threat=threat)  # type: ignore[type-var]

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """The outputs and features ``(N, D)`` of forward passes in eval mode without side effects."""
        raise NotImplementedError


class ModelBatch(AttackedBatch):
    """A batch that the attack runs by plain forward passes.

    Args:
        model: takes the inputs and returns logits.
        site: the batch, and the values in it that the attack perturbs.
        labels: labels of the batch.
        outputs: finds the logits in the model's return value.
        accepts_partial_batches: whether the model may be run on a part of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        site: PerturbationSite,
        labels: Any,
        outputs: Any = None,
        *,
        accepts_partial_batches: bool = True,
    ) -> None:
        self._module, self._pick = model, output_picker(outputs)
        self.site, self.labels = site, labels
        plain = self._pick is None and accepts_partial_batches
        self.model = (
            model if plain else PickedOutputModel(model, self._pick, accepts_partial_batches=accepts_partial_batches)
        )

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """The outputs and features of the model. Without a linear layer, ``"penultimate"`` means the outputs, with a warning."""
        recorder = ForwardRecorder(self._module, features, self._pick)
        try:
            recorder.attach(batches[0], temporary=True)
        except ValueError:
            if features != PENULTIMATE:
                raise
            rank_zero_warn("The model runs no nn.Linear, so its outputs are used as features.")
            return self.observe(OUTPUTS, *batches)
        try:
            with isolated(self._module, batches[0].device), eager():
                return [recorder.observe(batch.detach().clone()) for batch in batches]  # the model may work in place
        finally:
            recorder.detach()


class StepBatch(AttackedBatch):
    """A batch that the attack runs through the module's own step.

    Args:
        step: the step whose loss the attack maximises.
        site: the batch, and the values in it that the attack perturbs.
        labels: labels of the batch.
        inspection: what :func:`inspect_step` found.
        model: the model whose outputs are the logits, if the step runs it.
        outputs: finds the logits in the model's return value.
    """

    def __init__(
        self,
        step: Step,
        site: PerturbationSite,
        labels: Any,
        inspection: StepInspection,
        model: nn.Module,
        outputs: Any = None,
    ) -> None:
        self.step, self.site, self.labels, self.inspection = step, site, labels, inspection
        self._module, self._pick = model, output_picker(outputs)
        self.classifies = inspection.outputs is not None and inspection.by_sample
        self.has_outputs = inspection.model_calls > 0
        self._recorder = self._recorded(OUTPUTS)
        self.model = StepModel(step, site, self._recorder, self._read if self.classifies else None)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Context in which the step runs without side effects, and its outputs are recorded."""
        with eager():
            self._recorder.attach(self._run, temporary=True, head=self.inspection.outputs == "head")
            try:
                with self.step.repeatable(self.inputs.device, self.inspection.noise):
                    yield
            finally:
                self._recorder.detach()

    def attack(self, attack: Attack, generator: torch.Generator) -> Tensor:
        """The adversarial values ``(N, ...)``: an attack that maximises the step's own loss."""
        with eager():
            return attack_step(
                attack,
                self.step,
                self.site,
                noise=self.inspection.noise,
                recorder=self._recorder,
                read=(lambda recording: recording.outputs[0]) if self.has_outputs else None,
                labels=self.labels,
                generator=generator,
            )

    def loss(self, values: Tensor) -> float:
        """The step's own loss at these values."""
        with self.site.perturbed(values) as batch, torch.enable_grad():  # a logged loss is recognised by its graph
            loss = self.step.loss(batch)
        return float("nan") if loss is None else float(loss.detach())

    def observe(self, features: str, *batches: Tensor) -> Observed:
        """The outputs and features of runs of the step. If the layer ran several times, the features of its first run."""
        recorder, found = self._recorded(features), []
        try:
            recorder.attach(self._run, temporary=True, head=self.inspection.outputs == "head")
            for values in batches:
                with (
                    self.site.perturbed(values.detach().clone()) as batch,
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
        with self.step.repeatable(self.inputs.device, self.inspection.noise), self.site.perturbed(self.inputs) as batch:
            self.step(batch)

    def _read(self, recording: Any) -> Any:
        if self.inspection.outputs == "head":
            return recording.heads[-1]
        if not recording.outputs:
            return None
        return recording.outputs[0] if self.inspection.pick is None else self.inspection.pick(recording.outputs[0])

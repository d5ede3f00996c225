"""Runs a batch for a defense, by plain forward passes of the model or by calls of the module's own step."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import StepInspection
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.attacks.steps.step_attack import attack_step, required_loss
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.outputs import PickedOutputModel, tensor_of
from lightning_wdefense.modules.parallel import bypassed
from lightning_wdefense.modules.recording import OUTPUTS, ForwardRecorder, Recording
from lightning_wdefense.modules.state.isolation import eager, internal_pass, isolated
from lightning_wdefense.modules.state.random_state import RandomState
from lightning_wdefense.modules.steps import Step


class ForwardPasses(ABC):
    """One batch, and the forward passes over it that a recipe needs.

    Attributes:
        values: the values that the attack perturbs, ``(N, ...)``.
        labels: labels of the batch.
    """

    values: Tensor
    labels: Any

    @abstractmethod
    def attack(
        self, attack: Attack, *, generator: torch.Generator | None = None, execution: Execution | None = None
    ) -> Tensor:
        """The adversarial values ``(N, ...)`` of an attack."""

    @abstractmethod
    def run(self, values: Tensor) -> Branch:
        """A forward pass for a term of the recipe, with a graph, in the module's own modes."""

    @abstractmethod
    def without_side_effects(self, *, evaluation: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Context in which forward passes have no side effects, in eval mode or in the module's own modes."""

    @abstractmethod
    def record_step(self) -> contextlib.AbstractContextManager[Callable[[Any], Branch]]:
        """Record the user's own step. Yields a function from the step's result to its branch."""

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits of the labels."""
        return True

    @property
    def threat(self) -> ThreatModel | None:
        """The threat model in whose units the values are; ``None`` for that of the attack."""
        return None

    def classes(self, branch: Branch) -> Any:
        """The labels for a discrepancy between features of this branch, one per row of the features."""
        return self.labels


class ModelForwardPasses(ForwardPasses):
    """Plain forward passes of a model.

    Args:
        model: takes the inputs and returns logits.
        recorder: records the model; must be attached.
        inputs: ``(N, ...)`` in model units.
        labels: labels of the batch.
        compares: whether the recipe compares outputs, which must then contain a tensor.
        pick: finds the outputs in the model's return value, for the attack.
        whole: never run a part of the batch.
        wrapper: the model as it is wrapped for several processes. Only a synchronised pass goes through the wrapper.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        recorder: ForwardRecorder,
        inputs: Tensor,
        labels: Any,
        *,
        compares: bool = True,
        pick: Callable[[Any], Any] | None = None,
        whole: bool = False,
        wrapper: nn.Module | None = None,
    ) -> None:
        self._whole, self._wrapper = whole, wrapper
        self.model, self._recorder, self.values, self.labels = model, recorder, inputs, labels
        self._compares, self._pick = compares, pick

    def attack(
        self, attack: Attack, *, generator: torch.Generator | None = None, execution: Execution | None = None
    ) -> Tensor:
        """The adversarial inputs ``(N, ...)`` of an attack, in model units."""
        model = self.model if self._pick is None else PickedOutputModel(self.model, self._pick)
        if self._whole:
            execution = replace(execution or Execution(), whole=True)
        with bypassed(self._wrapper):
            return attack(model, self.values, self.labels, generator=generator, execution=execution)

    def run(self, values: Tensor, *, synchronised: bool = False) -> Branch:
        """A plain forward pass.

        Args:
            values: the values, ``(N, ...)``.
            synchronised: go through the wrapper, which prepares the backward pass on all ranks. One pass a batch must.
        """
        through = contextlib.nullcontext() if synchronised else bypassed(self._wrapper)
        with internal_pass(), through, self._recorder.recording() as recording:
            outputs = self.model(values)
        if self.model is not self._recorder.model:
            recording.outputs = [outputs if self._pick is None else self._pick(outputs)]
        return self._branch(recording)

    def without_side_effects(self, *, evaluation: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Context in which the state of the user's module is preserved."""
        return _isolated_eager(self.model, self.values.device, evaluation, self._wrapper)

    @contextlib.contextmanager
    def record_step(self) -> Iterator[Callable[[Any], Branch]]:
        """Record the user's own call of the model on the whole batch."""
        with self._recorder.recording() as recording:
            yield lambda result: self._branch(recording)

    def classes(self, branch: Branch) -> Any:
        """The labels; for one label per element (masks), all samples get the same class."""
        labels = self.labels
        if (
            isinstance(labels, Tensor)
            and labels.ndim > 1
            and not labels.is_floating_point()
            and labels.numel() > len(labels)
        ):
            return torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        return labels

    def _branch(self, recording: Recording) -> Branch:
        """Outputs and features of the recorded pass over the whole batch.

        Raises:
            RuntimeError: if the model did not run exactly once on the whole batch.
            TypeError: if the recipe compares outputs and they contain no tensor.
        """
        outputs, model, size = recording.outputs, self._recorder.model, len(self.values)
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        hint = (
            "Call the module itself (`self(x)`) once in training_step, or name the submodule that is called on the whole batch "
            f"with model=; its submodules: {', '.join(map(repr, children)) or 'none'}. Or let the attack go through the step: "
            'WassersteinDefense(..., through="step").'
        )
        if len(outputs) != 1:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: its forward ran {len(outputs)} times during "
                f"the step, but must run once. {hint}"
            )
        try:
            found = tensor_of(outputs[0])
        except TypeError:
            if self._compares:
                raise
            return Branch(outputs[0], torch.empty(size, 0))
        if found.ndim == 0 or len(found) != size:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: their shape is {tuple(found.shape)}, but the "
                f"batch has {size} samples. {hint}"
            )
        return Branch(outputs[0], self._recorder.features_of(outputs[0], recording, size))


class StepForwardPasses(ForwardPasses):
    """Forward passes that are calls of the module's own step.

    Args:
        step: the step.
        site: the batch, and the values in it that the attack perturbs.
        labels: labels of the batch, or ``None``.
        inspection: what :func:`inspect_step` found.
        recorder: records the module; must be attached.
        compares: whether the recipe compares outputs or features.
    """

    def __init__(
        self,
        step: Step,
        site: PerturbationSite,
        labels: Any,
        inspection: StepInspection,
        recorder: ForwardRecorder,
        *,
        compares: bool,
    ) -> None:
        self._step, self._site, self._inspection, self._recorder = step, site, inspection, recorder
        self.values, self.labels, self._compares = site.values, labels, compares
        self._random = RandomState(self.values.device)

    def attack(
        self, attack: Attack, *, generator: torch.Generator | None = None, execution: Execution | None = None
    ) -> Tensor:
        """The adversarial values ``(N, ...)`` of an attack through the step."""
        return attack_step(
            attack,
            self._step,
            self._site,
            noise=self._inspection.noise,
            recorder=self._recorder,
            read=self._read_for(attack),
            labels=self.labels,
            generator=generator,
            execution=execution,
        )

    @property
    def threat(self) -> ThreatModel | None:
        """The threat model of the place that is attacked."""
        return self._site.threat

    def perturbed(self, values: Tensor) -> contextlib.AbstractContextManager[Any]:
        """The batch with these values."""
        return self._site.perturbed(values)

    def run(self, values: Tensor) -> Branch:
        """One more call of the step, with the random state that the user's own call starts from."""
        if self._step.ready:  # inside of Step.repeatable
            with self.perturbed(values) as batch, self._recorder.recording() as recording:
                loss = required_loss(self._step, batch)
            return self._branch(recording, loss)
        once_more = self._step.one_more_call(self._random)
        with (
            internal_pass(),
            once_more as call,
            self.perturbed(values) as batch,
            self._recorder.recording() as recording,
        ):
            result = call(batch)
        return self.branch_of(recording, result)

    def without_side_effects(self, *, evaluation: bool = True) -> contextlib.AbstractContextManager[Any]:
        """The context in which the step is repeatable."""
        return self._step.repeatable(self.values.device, self._inspection.noise if evaluation else "own")

    @contextlib.contextmanager
    def record_step(self) -> Iterator[Callable[[Any], Branch]]:
        """Record the user's own call of the step."""
        with self._recorder.recording() as recording:
            yield lambda result: self.branch_of(recording, result)

    def classes(self, branch: Branch) -> Any:
        """The labels, repeated for each time that the layer ran. If they are not classes, all rows get the same class."""
        labels, rows = self.labels, len(branch.features)
        if isinstance(labels, Tensor) and labels.ndim and len(labels) and rows % len(labels) == 0:
            soft = labels.is_floating_point()
            by_sample = labels.ndim == 1 + soft or labels.numel() == len(labels)
            if by_sample and (not soft or self._inspection.outputs is not None):
                return torch.cat([labels] * (rows // len(labels)))
        return torch.zeros(rows, dtype=torch.long, device=branch.features.device)

    @property
    def classifies(self) -> bool:
        """Whether the inspection found that the outputs are logits of the labels."""
        return self._inspection.outputs is not None

    def read(self, recording: Recording) -> Any:
        """The model's outputs: its return value (of several calls, the first), or the output of the last linear layer."""
        if recording.outputs and self._inspection.outputs != "head":
            outputs = recording.outputs[0]
            return outputs if self._inspection.pick is None else self._inspection.pick(outputs)
        return recording.heads[-1]

    def _read_for(self, attack: Attack) -> Callable[[Recording], Any] | None:
        """Finds the outputs for the attack: the model's whole return value for a loss of the user's own, otherwise the logits."""
        if self._inspection.model_calls and callable(getattr(attack, "loss", None)):
            return lambda recording: recording.outputs[0]
        return self.read if self._inspection.outputs is not None or self._inspection.model_calls else None

    def branch_of(self, recording: Recording, result: Any) -> Branch:
        """The branch of a call of the step."""
        return self._branch(recording, self._step.loss_of(result))

    def _branch(self, recording: Recording, loss: Tensor | None) -> Branch:
        outputs = self.read(recording) if recording.outputs or recording.heads else None
        if not self._compares:
            return Branch(outputs, torch.empty(len(self.values), 0), loss)
        if self._recorder.features == OUTPUTS:
            if outputs is None:
                raise RuntimeError(
                    f"The recipe compares the model's outputs, but {self._step.name} of {type(self._step.module).__name__} showed none. Name "
                    'the submodule that returns them with model=, or compare features: features="penultimate", or a dotted path.'
                )
            return Branch(outputs, tensor_of(outputs), loss)
        return Branch(outputs, self._features(recording), loss)

    def _features(self, recording: Recording) -> Tensor:
        found = [self._recorder.rows(each) for each in recording.features if isinstance(each, Tensor)]
        if not found:
            raise ValueError(
                f"The layer of features={self._recorder.features!r} did not run in {self._step.name}, or returned no tensor. Name another "
                "layer with features=."
            )
        return torch.cat(found) if len({each.shape[1] for each in found}) == 1 else found[-1]


@contextlib.contextmanager
def _isolated_eager(
    model: Callable[..., Any], device: torch.device, evaluation: bool, wrapper: nn.Module | None
) -> Iterator[None]:
    with isolated(model, device, evaluation=evaluation), bypassed(wrapper):
        if evaluation:
            with eager():
                yield
        else:
            yield

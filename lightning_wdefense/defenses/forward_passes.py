"""How a defense runs a batch: by plain forward passes of the model, or through the module's own step."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import StepInspection
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.attacks.steps.step_attack import attack_step, required_loss
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.outputs import PickedOutputModel, tensor_of
from lightning_wdefense.modules.recording import OUTPUTS, ForwardRecorder, Recording
from lightning_wdefense.modules.state.isolation import eager, internal_pass, isolated
from lightning_wdefense.modules.state.random_state import RandomState
from lightning_wdefense.modules.steps import Step


class ForwardPasses(ABC):
    """One batch, and the passes over it that a recipe needs.

    Attributes:
        values: what the adversary moves, ``(N, ...)``.
        labels: of the batch.
    """

    values: Tensor
    labels: Any

    @abstractmethod
    def attack(
        self, attack: Attack, *, generator: torch.Generator | None = None, execution: Execution | None = None
    ) -> Tensor:
        """The values that the attack finds."""

    @abstractmethod
    def run(self, values: Tensor) -> Branch:
        """A pass of ours over these values, with a graph, in the module's own modes."""

    @abstractmethod
    def without_side_effects(self, *, evaluation: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Inside, passes leave no trace, in eval mode or in the module's own modes."""

    @abstractmethod
    def watch(self) -> contextlib.AbstractContextManager[Callable[[Any], Branch]]:
        """Watch the user's own step; what is yielded makes the branch of the step's result."""

    @property
    def classifies(self) -> bool:
        """Whether the outputs may be read as logits."""
        return True

    def classes(self, branch: Branch) -> Any:
        """The labels for a discrepancy between features of this branch."""
        return self.labels


class ModelForwardPasses(ForwardPasses):
    """Plain forward passes of a model.

    Args:
        model: takes the inputs and returns logits.
        recorder: of the model, attached.
        inputs: ``(N, ...)`` in model units.
        labels: of the batch.
        compares: whether the outputs must hold a tensor.
        pick: finds the outputs in what the model returns, for the attack.
        whole: never run a part of the batch.
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
    ) -> None:
        self._whole = whole
        self.model, self._recorder, self.values, self.labels = model, recorder, inputs, labels
        self._compares, self._pick = compares, pick

    def attack(
        self, attack: Attack, *, generator: torch.Generator | None = None, execution: Execution | None = None
    ) -> Tensor:
        """The inputs that the attack finds."""
        model = self.model if self._pick is None else PickedOutputModel(self.model, self._pick)
        if self._whole:
            execution = replace(execution or Execution(), whole=True)
        return attack(model, self.values, self.labels, generator=generator, execution=execution)

    def run(self, values: Tensor) -> Branch:
        """A plain forward pass."""
        with internal_pass(), self._recorder.recording() as recording:
            outputs = self.model(values)
        if self.model is not self._recorder.model:
            recording.outputs = [outputs if self._pick is None else self._pick(outputs)]
        return self._branch(recording)

    def without_side_effects(self, *, evaluation: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Isolated from the user's module."""
        return _isolated_eager(self.model, self.values.device, evaluation)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Callable[[Any], Branch]]:
        """Watch somebody else call the model once on the whole batch."""
        with self._recorder.recording() as recording:
            yield lambda result: self._branch(recording)

    def classes(self, branch: Branch) -> Any:
        """The labels; where there is one for each element (masks), all samples are of one class."""
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
        """Outputs and features of the one pass over the whole batch.

        Raises:
            RuntimeError: if the model did not run exactly once on the whole batch.
            TypeError: if its outputs hold no tensor, which the recipe compares.
        """
        outputs, model, size = recording.outputs, self._recorder.model, len(self.values)
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        hint = (
            "Call the module itself (`self(x)`) once in training_step, or name the submodule that is called on the whole batch "
            f"with model=; its submodules: {', '.join(map(repr, children)) or 'none'}. Or let the adversary go through the step: "
            'WassersteinDefense(..., through="step").'
        )
        if len(outputs) != 1:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: its forward ran {len(outputs)} times during "
                f"the step, where once was expected. {hint}"
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
    """Calls of the module's own step.

    Args:
        step: the step.
        site: the batch, and what the adversary moves of it.
        labels: of the batch; ``None`` where there are none.
        inspection: what :func:`inspect_step` found.
        recorder: of the module, attached.
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
        """The values that the attack finds through the step."""
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

    def perturbed(self, values: Tensor) -> contextlib.AbstractContextManager[Any]:
        """The batch with these values."""
        return self._site.perturbed(values)

    def run(self, values: Tensor) -> Branch:
        """One more call of the step: where the user's own began, it draws the same noise."""
        if self._step.ready:  # in a rehearsal
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
        """A rehearsal of the step."""
        return self._step.repeatable(self.values.device, self._inspection.noise if evaluation else "own")

    @contextlib.contextmanager
    def watch(self) -> Iterator[Callable[[Any], Branch]]:
        """Watch the user's own call of the step."""
        with self._recorder.recording() as recording:
            yield lambda result: self.branch_of(recording, result)

    def classes(self, branch: Branch) -> Any:
        """The labels, once for each time that the samples were seen; where they are no classes, all rows are of one."""
        labels, rows = self.labels, len(branch.features)
        if isinstance(labels, Tensor) and labels.ndim and len(labels) and rows % len(labels) == 0:
            soft = labels.is_floating_point()
            by_sample = labels.ndim == 1 + soft or labels.numel() == len(labels)
            if by_sample and (not soft or self._inspection.outputs is not None):
                return torch.cat([labels] * (rows // len(labels)))
        return torch.zeros(rows, dtype=torch.long, device=branch.features.device)

    @property
    def classifies(self) -> bool:
        """Whether the outputs were seen to be logits of the labels."""
        return self._inspection.outputs is not None

    def read(self, recording: Recording) -> Any:
        """The model's outputs in a pass: what it returned, or what the last linear layer did; of several calls the first."""
        if recording.outputs and self._inspection.outputs != "head":
            outputs = recording.outputs[0]
            return outputs if self._inspection.pick is None else self._inspection.pick(outputs)
        return recording.heads[-1]

    def _read_for(self, attack: Attack) -> Callable[[Recording], Any] | None:
        """How the attack is given outputs: a loss of the user's own all that the model returned, others the logits."""
        if self._inspection.model_calls and callable(getattr(attack, "loss", None)):
            return lambda recording: recording.outputs[0]
        return self.read if self._inspection.outputs is not None or self._inspection.model_calls else None

    def branch_of(self, recording: Recording, result: Any) -> Branch:
        """What a call of the step showed."""
        return self._branch(recording, self._step.loss_of(result))

    def _branch(self, recording: Recording, loss: Tensor | None) -> Branch:
        outputs = self.read(recording) if recording.outputs or recording.heads else None
        if not self._compares:
            return Branch(outputs, torch.empty(len(self.values), 0), loss)
        if self._recorder.features == OUTPUTS:
            if outputs is None:
                raise RuntimeError(
                    f"The recipe compares the model's outputs, and none were found in the {self._step.name} of "
                    f"{type(self._step.module).__name__}: name the submodule that returns them with model=, or compare features instead: "
                    'features="penultimate", or a dotted path.'
                )
            return Branch(outputs, tensor_of(outputs), loss)
        return Branch(outputs, self._features(recording), loss)

    def _features(self, recording: Recording) -> Tensor:
        found = [self._recorder.rows(each) for each in recording.features if isinstance(each, Tensor)]
        if not found:
            raise ValueError(
                f"The layer of features={self._recorder.features!r} did not run in {self._step.name}, or returned no tensor: name one that "
                "does with features=."
            )
        return torch.cat(found) if len({each.shape[1] for each in found}) == 1 else found[-1]


@contextlib.contextmanager
def _isolated_eager(model: Callable[..., Any], device: torch.device, evaluation: bool) -> Iterator[None]:
    with isolated(model, device, evaluation=evaluation):
        if evaluation:
            with eager():
                yield
        else:
            yield

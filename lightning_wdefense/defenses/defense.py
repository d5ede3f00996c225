"""A recipe at work on a model: attacks it, watches it, measures it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._guests import Guest
from lightning_wdefense.attacks import LearnedAttack
from lightning_wdefense.attacks.labels import class_labels, counted, hard_labels
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.critic import CriticDiscrepancy, LiveCritic
from lightning_wdefense.defenses.discrepancies import Transport, get_discrepancy
from lightning_wdefense.defenses.objective import combine
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.defenses.weight_perturbation import WeightPerturbation
from lightning_wdefense.modules.isolation import eager, isolated, own_pass
from lightning_wdefense.modules.outputs import predictions, tensor_of
from lightning_wdefense.modules.recording import ForwardRecorder, Recording

UNTRAINED: dict[str, Any] = {"batches": 0, "multiplier": None, "critic": None}
"""The state of a defense that has seen no batch."""


class Defense(Guest):
    """Binds a recipe to the module whose outputs it regularises.

    Copies of that module do not have it: a mixin's copy has what was learned, and makes a defense of its own.

    Args:
        recipe: what to do.
        model: takes the inputs and returns logits.

    Raises:
        ValueError: if the recipe's features name no submodule.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.model, self.host = recipe, model, model
        self.batches: int | None = 0
        self._counted: tuple[int, int] | None = None
        self.multiplier: float | None = None
        self.critic: LiveCritic | None = None
        self._discrepancy = None if recipe.discrepancy is None else get_discrepancy(recipe.discrepancy)
        if isinstance(self._discrepancy, CriticDiscrepancy):
            self.critic = LiveCritic(self._discrepancy)
        self.recorder = ForwardRecorder(model, recipe.features)
        self.perturbation = WeightPerturbation(model, recipe.awp)

    def left_behind(self) -> Any:
        """What was learned, from which the copy's own goes on."""
        return copy.deepcopy(self.state_dict())

    def count_batch(self, trainer: object, begun: int) -> int:
        """How many batches were defended, this one included.

        Optimizer steps would not do (there may be two a batch, or one in four), nor all batches of the trainer (training may have begun
        without the defense). However often it is asked of one batch, that counts once: LBFGS calls the step again and again.

        Args:
            trainer: whose batch it is.
            begun: how many batches it has begun.
        """
        if self.batches is None:  # a checkpoint of 0.1.0, which did not count
            self.batches = begun - 1
        if self._counted != (id(trainer), begun):
            self._counted = (id(trainer), begun)
            self.batches += 1
        return self.batches

    def adversarial(
        self,
        inputs: Tensor,
        labels: Any,
        *,
        radius: float = 1.0,
        generator: torch.Generator | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Adversarial inputs of the recipe's attack, from which a learned attack learns.

        Args:
            inputs: ``(N, ...)`` in model units.
            labels: of the batch.
            radius: factor on the attack's eps (the warm-up).
            generator: source of the attack's noise.
            average: the mean of a scalar over all ranks, on which all of them learn the same.
        """
        attack = self.recipe.attack_at(radius)
        if isinstance(attack, LearnedAttack) and self.multiplier is not None:
            attack = replace(attack, multiplier=self.multiplier)  # type: ignore[type-var]
        adversarial = attack(self.model, inputs, labels, generator=generator, execution=self.recipe.execution)
        if isinstance(attack, LearnedAttack):
            displacement = attack.displacement(inputs, adversarial)
            self.multiplier = attack.updated_multiplier(displacement if average is None else average(displacement))
        return adversarial

    def learn(
        self,
        clean: Branch | None,
        adversarial: Branch | None,
        labels: Any,
        *,
        generator: torch.Generator | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        measure: bool = False,
    ) -> dict[str, Any]:
        """Train the recipe's critic, if it has one, on the detached features of a batch.

        Args:
            clean: the clean inputs' branch.
            adversarial: the adversarial inputs' branch.
            labels: of the batch.
            generator: source of its noise.
            average: the mean of a tensor over all ranks.
            measure: whether to say what the critic made of the batch.

        Returns:
            That, for the logs.
        """
        if self.critic is None or clean is None or adversarial is None:
            return {}
        try:
            return self.critic.update(clean, adversarial, labels, generator=generator, average=average, measure=measure)
        except ValueError:
            if clean.finite and adversarial.finite:
                raise
            return {}  # what has diverged, and what to do, is said by combine

    def learned(self) -> dict[str, float]:
        """What the recipe has learned, for the logs."""
        return {} if self.multiplier is None else {"multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """What the recipe has learned, and how many batches it defended, for a checkpoint."""
        critic = None if self.critic is None else self.critic.state_dict()
        return {"batches": self.batches, "multiplier": self.multiplier, "critic": critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; from an empty state, that of a training without the defense, begin."""
        state = state or UNTRAINED
        self.batches, self._counted = state.get("batches"), None
        self.multiplier = state.get("multiplier")
        if self.critic is not None:
            self.critic.load_state_dict(state.get("critic"))

    @contextlib.contextmanager
    def perturbed_weights(
        self, inputs: Tensor, adversarial: Tensor, labels: Any, task_loss: Callable[[Any, Any], Tensor] | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Where the recipe has ``awp``, the weights are moved uphill on its loss inside; buffers and random state are not.

        Costs the passes of a training step without the attack, in the model's own modes.

        Args:
            inputs: ``(N, ...)`` in model units.
            adversarial: the adversarial inputs.
            labels: of the batch.
            task_loss: ``(outputs, labels) -> scalar`` on what ``training_step`` sees; the recipe's by default.

        Yields:
            A function of the step's loss, after which the weights come back at the end of its backward pass. Without that call, after an
            exception, and for a loss without a graph, they come back with the end of the context. A backward pass that may not come is
            the caller's to look after, by :meth:`restore_weights`.
        """
        recipe, perturbation = self.recipe, self.perturbation
        waiting = False

        def until_backward(loss: Tensor) -> None:
            nonlocal waiting
            waiting = perturbation.undo_after(loss)

        try:
            if recipe.awp > 0:
                perturbation.undo()
                with isolated(self.model, inputs.device, evaluation=False):
                    clean = self.forward(inputs) if recipe.needs("clean") else None
                    attacked = self.forward(adversarial) if recipe.needs("adversarial") else None
                    seen = clean if recipe.sees == "clean" else attacked
                    assert seen is not None
                    loss = (task_loss or recipe.task_loss)(seen.outputs, labels)
                    perturbation.apply(self.combine(loss, clean, attacked, labels)[0])
            yield until_backward
        except BaseException:
            waiting = False
            raise
        finally:
            if not waiting:
                perturbation.undo()

    def combine(
        self, task_loss: Tensor, clean: Branch | None, adversarial: Branch | None, labels: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The training loss and its parts: see :func:`~lightning_wdefense.defenses.objective.combine`."""
        return combine(self.recipe, task_loss, clean, adversarial, labels, self._measure)

    def _measure(self, clean: Branch, adversarial: Branch, labels: Any) -> Tensor:
        try:
            if self.critic is not None:
                return self.critic.gap(clean, adversarial, labels)
            assert callable(self._discrepancy)
            return self._discrepancy(clean.features, adversarial.features, labels)
        except ValueError:
            if clean.finite and adversarial.finite:
                raise
            return clean.features.new_tensor(torch.nan)  # combine says which part is not finite, and what to do

    def restore_weights(self) -> None:
        """Take perturbed weights back now: the backward pass failed, or never came."""
        self.perturbation.undo()

    def forward(self, inputs: Tensor) -> Branch:
        """A plain forward pass, in whatever mode the model is in."""
        with own_pass(), self.watch(len(inputs)) as seen:
            self.model(inputs)
        return seen.branch()

    @contextlib.contextmanager
    def watch(self, size: int) -> Iterator[Watch]:
        """Watch somebody else call the model once on ``size`` samples."""
        with self.recorder.recording() as recording:
            yield Watch(self, recording, size)

    def measure(self, inputs: Tensor, adversarial: Tensor, labels: Any) -> dict[str, Tensor]:
        """What the attack did, in eval mode and without a trace: accuracies, success, and the transport cost of the features.

        Costs two forward passes. Accuracies are left out where the labels are not classes of the outputs, and the transport where there
        are no features, or none that are finite.
        """
        with isolated(self.model, inputs.device), eager():
            clean, attacked = self.forward(inputs), self.forward(adversarial)
        measured = {}
        if clean.features.numel() and clean.finite and attacked.finite:
            measured["transport_cost"] = Transport()(clean.features.detach(), attacked.features.detach())
        with contextlib.suppress(TypeError, ValueError):
            target = hard_labels(class_labels(labels, clean.outputs, check_values=True))
            counts = counted(target)
            right = (predictions(clean.outputs) == target)[counts]
            still = (predictions(attacked.outputs) == target)[counts]
            measured["clean_acc"] = right.float().mean()
            measured["adversarial_acc"] = still.float().mean()
            measured["attack_success"] = (right & ~still).sum() / right.sum().clamp_min(1)
        return measured


class Watch:
    """What was seen of the model during :meth:`Defense.watch`."""

    def __init__(self, defense: Defense, recording: Recording, size: int) -> None:
        self._defense, self._recording, self._size = defense, recording, size

    def branch(self) -> Branch:
        """Outputs and features of the one pass over the whole batch.

        Raises:
            RuntimeError: if the model did not run exactly once on the whole batch.
            TypeError: if its outputs hold no tensor, which the recipe compares.
        """
        outputs, model = self._recording.outputs, self._defense.model
        children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        hint = (
            "Call the module itself (`self(x)`) once in training_step, or name the submodule that is called on the whole batch "
            f"with model=; its submodules: {', '.join(map(repr, children)) or 'none'}."
        )
        if len(outputs) != 1:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: its forward ran {len(outputs)} times during "
                f"the step, where once was expected. {hint}"
            )
        try:
            found = tensor_of(outputs[0])
        except TypeError:
            if self._defense.recipe.compares:
                raise
            return Branch(outputs[0], torch.empty(self._size, 0))
        if found.ndim == 0 or len(found) != self._size:
            raise RuntimeError(
                f"The outputs of {type(model).__name__} could not be captured: their shape is {tuple(found.shape)}, but the "
                f"batch has {self._size} samples. {hint}"
            )
        recorder = self._defense.recorder
        return Branch(outputs[0], recorder.features_of(outputs[0], self._recording, self._size))

"""A recipe at work on a model: attacks it, watches it, measures it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.attacks import LearnedAttack
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.critic import CriticDiscrepancy, OnlineCritic
from lightning_wdefense.defenses.discrepancies import Transport, get_discrepancy
from lightning_wdefense.defenses.forward_passes import ForwardPasses, ModelForwardPasses
from lightning_wdefense.defenses.objective import combine
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.defenses.weight_perturbation import WeightPerturbation
from lightning_wdefense.modules.attachments import Attachment
from lightning_wdefense.modules.outputs import predictions
from lightning_wdefense.modules.recording import ForwardRecorder, trial_pass

UNTRAINED: dict[str, Any] = {"batches": 0, "multiplier": None, "critic": None}
"""The state of a defense that has seen no batch."""


class Defense(Attachment):
    """Binds a recipe to the module whose outputs it regularises.

    Copies of that module do not have it: a mixin's copy has what was learned, and makes a defense of its own.

    Args:
        recipe: what to do.
        model: takes the inputs and returns logits.
        pick: finds the outputs in what the model returns.

    Raises:
        ValueError: if the recipe's features name no submodule.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, pick: Callable[[Any], Any] | None = None) -> None:
        self.recipe, self.model, self.host, self.pick = recipe, model, model, pick
        self.batches: int | None = 0
        self._counted: tuple[int, int] | None = None
        self.multiplier: float | None = None
        self.critic: OnlineCritic | None = None
        self._discrepancy = None if recipe.discrepancy is None else get_discrepancy(recipe.discrepancy)
        if isinstance(self._discrepancy, CriticDiscrepancy):
            self.critic = OnlineCritic(self._discrepancy)
        self.recorder = ForwardRecorder(model, recipe.features, pick)
        self.perturbation = WeightPerturbation(model, recipe.awp)

    def value_in_state(self) -> Any:
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

    def passes(
        self, inputs: Tensor, labels: Any, model: Callable[[Tensor], Any] | None = None, *, whole: bool = False
    ) -> ModelForwardPasses:
        """Plain forward passes of the model (or of a callable in its place) over a batch, never over a part of it where it is ``whole``."""
        run = model or self.model
        self.recorder.attach(trial_pass(run, inputs))
        return ModelForwardPasses(
            run, self.recorder, inputs, labels, compares=self.recipe.compares, pick=self.pick, whole=whole
        )

    def adversarial(
        self,
        passes: ForwardPasses,
        *,
        radius: float = 1.0,
        generator: torch.Generator | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Adversarial inputs of the recipe's attack, from which a learned attack learns.

        Args:
            passes: over the batch.
            radius: factor on the attack's eps (the warm-up).
            generator: source of the attack's noise.
            average: the mean of a scalar over all ranks, on which all of them learn the same.
        """
        attack = self.recipe.attack_at(radius)
        if isinstance(attack, LearnedAttack) and self.multiplier is not None:
            attack = replace(attack, multiplier=self.multiplier)  # type: ignore[type-var]
        adversarial = passes.attack(attack, generator=generator, execution=self.recipe.execution)
        if isinstance(attack, LearnedAttack):
            displacement = attack.displacement(passes.values, adversarial)
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
        self, passes: ForwardPasses, adversarial: Tensor, task_loss: Callable[[Any, Any], Tensor] | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Where the recipe has ``awp``, the weights are moved uphill on its loss inside; buffers and random state are not.

        Costs the passes of a training step without the attack, in the model's own modes.

        Args:
            passes: over the batch.
            adversarial: the adversarial inputs.
            task_loss: ``(outputs, labels) -> scalar`` on what ``training_step`` sees; the step's own where the passes go through it, else
                the recipe's by default.

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
                with passes.without_side_effects(evaluation=False):
                    clean = passes.run(passes.values) if recipe.needs("clean") else None
                    attacked = passes.run(adversarial) if recipe.needs("adversarial") else None
                    seen = clean if recipe.sees == "clean" else attacked
                    assert seen is not None
                    loss = seen.loss
                    if loss is None:
                        loss = (task_loss or recipe.task_loss)(seen.outputs, passes.labels)
                    steps = perturbation.ascent_steps(self.combine(loss, clean, attacked, passes)[0])
                perturbation.apply(steps)  # out here, where nobody takes moved weights for a trace
            yield until_backward
        except BaseException:
            waiting = False
            raise
        finally:
            if not waiting:
                perturbation.undo()

    def combine(
        self, task_loss: Tensor, clean: Branch | None, adversarial: Branch | None, passes: ForwardPasses
    ) -> tuple[Tensor, dict[str, Any]]:
        """The training loss and its parts: see :func:`~lightning_wdefense.defenses.objective.combine`."""
        seen = clean if clean is not None else adversarial
        classes = passes.labels if seen is None or self.recipe.compares_classes else passes.classes(seen)
        return combine(
            self.recipe,
            task_loss,
            clean,
            adversarial,
            passes.labels,
            lambda one, other, _: self._measure(one, other, classes),
        )

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

    def measure(self, passes: ForwardPasses, adversarial: Tensor) -> dict[str, Tensor]:
        """What the attack did, in eval mode and without a trace: accuracies, success, and the transport cost of the features.

        Costs two passes. Accuracies are left out where the labels are not classes of the outputs, and the transport where there
        are no features, or none that are finite. Through the step its own loss on both sides is measured as well.
        """
        with passes.without_side_effects():
            clean, attacked = passes.run(passes.values), passes.run(adversarial)
        measured: dict[str, Tensor] = {}
        if clean.loss is not None and attacked.loss is not None:
            measured |= {"clean_loss": clean.loss.detach(), "adversarial_loss": attacked.loss.detach()}
        if clean.features.numel() and clean.finite and attacked.finite:
            measured["transport_cost"] = Transport()(clean.features.detach(), attacked.features.detach())
        with contextlib.suppress(TypeError, ValueError):
            if not passes.classifies:
                return measured
            target = hard_labels(class_labels(passes.labels, clean.outputs, check_values=True))
            counts = not_ignored(target)
            right = (predictions(clean.outputs) == target)[counts]
            still = (predictions(attacked.outputs) == target)[counts]
            measured["clean_acc"] = right.float().mean()
            measured["adversarial_acc"] = still.float().mean()
            measured["attack_success"] = (right & ~still).sum() / right.sum().clamp_min(1)
        return measured

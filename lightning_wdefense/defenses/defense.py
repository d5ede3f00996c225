"""Applies a recipe to a model: attack, weight perturbation, training loss and measurements."""

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
    """A recipe, bound to the model whose outputs it regularises.

    Copies of the model do not contain it. A copy of a module with the mixin has the learned state, and creates its own defense.

    Args:
        recipe: the recipe.
        model: takes the inputs and returns logits.
        pick: finds the outputs in the model's return value.

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
        """A copy of the learned state, with which the defense of a copied module continues."""
        return copy.deepcopy(self.state_dict())

    def count_batch(self, trainer: object, begun: int) -> int:
        """Number of batches that were defended, including the current one.

        Optimizer steps are not a substitute: there may be two per batch, or one per four batches. The trainer's number of batches is
        not either, because training may have begun without the defense. A batch counts once, even if the step is called several
        times on it, as with LBFGS.

        Args:
            trainer: the trainer that runs the batch.
            begun: number of batches that the trainer has begun.
        """
        if self.batches is None:  # a checkpoint of version 0.1.0, which had no count
            self.batches = begun - 1
        if self._counted != (id(trainer), begun):
            self._counted = (id(trainer), begun)
            self.batches += 1
        return self.batches

    def passes(
        self, inputs: Tensor, labels: Any, model: Callable[[Tensor], Any] | None = None, *, whole: bool = False
    ) -> ModelForwardPasses:
        """Plain forward passes over a batch.

        Args:
            inputs: ``(N, ...)`` in model units.
            labels: labels of the batch.
            model: a callable to run instead of the model.
            whole: never run a part of the batch.
        """
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
        """Adversarial inputs ``(N, ...)`` of the recipe's attack; also updates an attack that learns.

        Args:
            passes: forward passes over the batch.
            radius: factor on the attack's eps (the warm-up).
            generator: random generator of the attack's noise.
            average: mean of a scalar over all ranks, so that all ranks learn the same.
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
            clean: outputs and features of the clean inputs.
            adversarial: outputs and features of the adversarial inputs.
            labels: labels of the batch.
            generator: random generator of the critic's noise.
            average: mean of a tensor over all ranks.
            measure: whether to return the critic's measurements of the batch.

        Returns:
            The critic's measurements, for the logs.
        """
        if self.critic is None or clean is None or adversarial is None:
            return {}
        try:
            return self.critic.update(clean, adversarial, labels, generator=generator, average=average, measure=measure)
        except ValueError:
            if clean.finite and adversarial.finite:
                raise
            return {}  # combine raises the error that names what diverged

    def learned(self) -> dict[str, float]:
        """The learned multiplier of the attack, for the logs."""
        return {} if self.multiplier is None else {"multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """The learned state and the number of defended batches, for a checkpoint."""
        critic = None if self.critic is None else self.critic.state_dict()
        return {"batches": self.batches, "multiplier": self.multiplier, "critic": critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. An empty state, of a training without the defense, means a new start."""
        state = state or UNTRAINED
        self.batches, self._counted = state.get("batches"), None
        self.multiplier = state.get("multiplier")
        if self.critic is not None:
            self.critic.load_state_dict(state.get("critic"))

    @contextlib.contextmanager
    def perturbed_weights(
        self, passes: ForwardPasses, adversarial: Tensor, task_loss: Callable[[Any, Any], Tensor] | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Context in which the weights are perturbed to increase the recipe's loss, if the recipe has ``awp``.

        Buffers and the random state do not change. The cost is that of a training step without the attack, in the model's own modes.

        Args:
            passes: forward passes over the batch.
            adversarial: the adversarial inputs.
            task_loss: ``(outputs, labels) -> scalar``, the loss on the inputs of ``training_step``. Not used if the passes go through
                the step, which has its own loss. ``None`` for the recipe's task loss.

        Yields:
            A function to call with the step's loss; the weights are then restored at the end of the loss's backward pass. Without
            that call, after an exception, or for a loss without a graph, they are restored at the end of the context. If the backward
            pass may not happen, the caller must call :meth:`restore_weights`.
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
                perturbation.apply(steps)  # outside of that context, which would restore the weights
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
        """The training loss and its parts, see :func:`~lightning_wdefense.defenses.objective.combine`."""
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
            return clean.features.new_tensor(torch.nan)  # combine raises the error that names this part

    def restore_weights(self) -> None:
        """Restore perturbed weights now, for a backward pass that failed or did not happen."""
        self.perturbation.undo()

    def measure(self, passes: ForwardPasses, adversarial: Tensor) -> dict[str, Tensor]:
        """Accuracies, attack success and transport cost of the features, in eval mode without side effects.

        The cost is two forward passes. Accuracies are left out if the labels are not classes of the outputs. The transport cost is
        left out if there are no features or they are not finite. If the passes go through the step, its loss on clean and on
        adversarial inputs is included.
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

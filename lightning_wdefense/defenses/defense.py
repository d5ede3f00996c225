"""Applies a recipe to a model: attack, weight perturbation, training loss and measurements."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import is_a
from lightning_wdefense._ranks import Ranks
from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks import LearnedAttack
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.defenses.branch import Branch, Compared
from lightning_wdefense.defenses.critic import CriticDiscrepancy, OnlineCritic
from lightning_wdefense.defenses.discrepancies import Transport, get_discrepancy
from lightning_wdefense.defenses.forward_passes import ForwardPasses, ModelForwardPasses
from lightning_wdefense.defenses.losses.jacobian import (
    check_double_backward,
    random_directions,
    slopes_along,
    squared_slope,
    transport_directions,
)
from lightning_wdefense.defenses.objective import combine
from lightning_wdefense.defenses.step import DefenseOutput, StepSettings
from lightning_wdefense.defenses.terms import Terms
from lightning_wdefense.defenses.weight_perturbation import WeightPerturbation
from lightning_wdefense.modules.attachments import Attachment
from lightning_wdefense.modules.outputs import float32_or_better, predictions, tensor_of
from lightning_wdefense.modules.parallel import is_sharded, synchronise_buffers, unwrapped
from lightning_wdefense.modules.recording import ForwardRecorder, trial_pass
from lightning_wdefense.modules.state.isolation import eager
from lightning_wdefense.transport.sharing import rows_shared

UNTRAINED: dict[str, Any] = {"batches": 0, "warmup": None, "multiplier": None, "critic": None}
"""The state of a defense that has seen no batch."""


class Defense(Attachment):
    """A recipe, bound to the model whose outputs it regularises: call it on a batch to get the loss to minimise.

    Created by :meth:`Recipe.bind` in a training loop of your own; the callback and the mixin create one for themselves.
    Copies of the model do not contain it. A copy of a module with the mixin has the learned state, and creates its own defense.

    Args:
        recipe: the recipe.
        model: takes the inputs and returns logits. It may be wrapped by ``DistributedDataParallel`` or by Fabric.
        pick: finds the outputs in the model's return value.
        seed: seed of the attack's noise.
        warmup_steps: number of batches over which eps grows from 0.

    Raises:
        TypeError: if the model is wrapped by something that shards its parameters in a way that an attack cannot work with.
        ValueError: if the recipe's features name no submodule, or ``warmup_steps`` is negative.
    """

    def __init__(
        self,
        recipe: Terms,
        model: nn.Module,
        pick: Callable[[Any], Any] | None = None,
        *,
        seed: int = 0,
        warmup_steps: float = 0.0,
    ) -> None:
        if not warmup_steps >= 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
        inner = unwrapped(model)
        if is_a(model, "DataParallel"):
            raise TypeError(
                "A model that is wrapped by DataParallel cannot be defended: it runs copies of the model, whose features are out of reach. Use "
                "DistributedDataParallel."
            )
        if recipe.awp > 0 and is_sharded(model):
            raise ValueError(
                f"awp={recipe.awp} perturbs weights by their own gradients, but FSDP2 shows gradients of sharded weights only to backward(): "
                "set awp=0, or use DistributedDataParallel (strategy='ddp')."
            )
        self.recipe, self.model, self.host, self.pick = recipe, model, model, pick
        self.seed, self.warmup_steps = seed, warmup_steps
        self.batches: int | None = 0
        self._warmup: tuple[float, float] | None = None
        self._counted: tuple[int, int] | None = None
        self._before: tuple[dict[str, Any], Callable[[], bool]] | None = None
        self._said_alone = False
        self._doubly = False  # whether the model is known to support double backward
        self.multiplier: float | None = None
        self.critic: OnlineCritic | None = None
        self._discrepancy = None if recipe.discrepancy is None else get_discrepancy(recipe.discrepancy)
        if isinstance(self._discrepancy, CriticDiscrepancy):
            self.critic = OnlineCritic(self._discrepancy)
        self.recorder = ForwardRecorder(inner, recipe.features, pick)
        self.perturbation = WeightPerturbation(model, recipe.awp)

    @torch.compiler.disable  # the attack's loop runs eagerly; a compiled forward is still called compiled
    def __call__(
        self,
        inputs: Tensor,
        labels: Any,
        *,
        step: int | None = None,
        forward: Callable[[Tensor], Any] | None = None,
        measure: bool = False,
    ) -> DefenseOutput:
        """Attack a batch and compute the recipe's loss on it.

        Under torch.distributed every rank must call it for every batch. With a recipe that has ``awp`` the weights are perturbed when
        this returns, and restored when the backward pass of the loss ends; without a backward pass call :meth:`restore_weights`.

        Args:
            inputs: clean inputs ``(N, ...)`` in model units.
            labels: labels in the form that the attack and the recipe's task loss accept.
            step: number of the batch in the training, from 0. The noise depends only on the seed, the step and the rank, so that a
                resumed run draws the same. ``None`` for the number of batches so far, which is part of :meth:`state_dict`.
            forward: maps inputs to outputs, if the model itself does not: a callable that passes the model its other arguments,
                ``lambda x: model(x, mask)``.
            measure: also return accuracies, attack success and transport cost in ``logs``, for two more forward passes.

        Returns:
            The loss, outputs, adversarial inputs and logs.

        Raises:
            TypeError: if inputs or outputs are of a type that cannot be attacked, such as a tuple of inputs.
            ValueError: if inputs or labels do not fit the threat model or the outputs.
            FloatingPointError: if a part of the loss is NaN or infinite; the message names the part.

        Example:
            >>> from lightning_wdefense import Recipe, ThreatModel
            >>> model = nn.Linear(4, 3)
            >>> defense = Recipe.named("trades", ThreatModel(eps=0.1)).bind(model)
            >>> output = defense(torch.rand(8, 4), torch.arange(8) % 3)
            >>> output.loss.backward()
            >>> sorted(output.logs)
            ['discrepancy', 'eps', 'loss', 'task_loss']
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"A defense attacks one tensor, got a {type(inputs).__name__}. If the model takes several arguments, attack one of them and "
                "bind the others: defense(x, labels, forward=lambda x: model(x, mask))."
            )
        number = (self.batches or 0) if step is None else step
        # A batch without a number is a new one: below zero it is never taken for a repeated step.
        batches = self.count_batch(self, number if step is not None else -1 - number)
        ranks = Ranks.current()
        settings = StepSettings(
            radius=min(1.0, batches / max(self.warmup_steps, 1.0)) if self.recipe.active and self.warmup_steps else 1.0,
            generator=seeded_generator(inputs.device, self.seed, number, ranks.rank),
            ranks=ranks,
            measure=measure,
        )
        synchronise_buffers(self.model)
        return self.run(inputs, labels, settings, forward=forward)

    def run(
        self,
        inputs: Tensor,
        labels: Any,
        settings: StepSettings,
        *,
        forward: Callable[[Tensor], Any] | None = None,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> DefenseOutput:
        """The recipe's loss on a batch by plain forward passes, with settings that the caller gives.

        Args:
            inputs: clean inputs ``(N, ...)`` in model units.
            labels: labels of the batch.
            settings: what else the step has to know.
            forward: maps inputs to outputs, if the model itself does not.
            task_loss: ``(outputs, labels) -> scalar``; ``None`` for the recipe's task loss.
        """
        task_loss = task_loss or self.recipe.task_loss
        passes = self.passes(inputs, labels, forward and _bound(self.model, forward))

        def step(values: Tensor) -> tuple[Tensor, Branch]:
            branch = passes.run(values, synchronised=True)
            return task_loss(branch.outputs, labels), branch

        output = self.step(passes, step, settings, task_loss)
        assert output is not None
        return output

    def step(
        self,
        passes: ForwardPasses,
        step: Callable[[Tensor], tuple[Tensor, Branch] | None],
        settings: StepSettings,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> DefenseOutput | None:
        """The recipe's loss on a batch.

        Args:
            passes: forward passes over the batch.
            step: runs the task on the given values, once, and returns its loss and branch; ``None`` if it skips the batch.
            settings: what else the step has to know.
            task_loss: see :meth:`perturbed_weights`.

        Returns:
            The loss and what belongs to it; ``None`` if ``step`` skips the batch.
        """
        recipe, ranks = self.recipe, settings.ranks
        adversarial = self.adversarial(passes, settings) if recipe.active else passes.values
        measured = self.measure(passes, adversarial) if settings.measure else {}
        with self.perturbed_weights(passes, adversarial, ranks, task_loss, settings.generator) as until_backward:
            sees_clean = recipe.sees == "clean"
            result = step(passes.values if sees_clean else adversarial)
            if result is None:
                return None
            task, seen = result
            other: Branch | None = None
            if recipe.needs("adversarial" if sees_clean else "clean"):
                other = passes.run(adversarial) if sees_clean else self._clean_pass(passes)
            clean, attacked = (seen, other) if sees_clean else (other, seen)
            compared = self._compared(clean, attacked, ranks)
            measured |= self.learn(compared, passes.classes(seen), settings)
            loss, logs = self.combine(task, clean, attacked, passes, compared, settings.generator)
            until_backward(loss)
        return DefenseOutput(
            loss,
            clean.outputs if clean is not None else None,
            attacked.outputs if attacked is not None else None,
            adversarial,
            {**logs, **measured, "eps": settings.radius * recipe.eps, **self.learned()},
        )

    @property
    def device(self) -> torch.device:
        """The device of the model; the CPU for a model without parameters."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def value_in_state(self) -> Any:
        """A copy of the learned state, with which the defense of a copied module continues."""
        return copy.deepcopy(self.state_dict())

    def count_batch(self, trainer: object, begun: int, is_running: Callable[[], bool] | None = None) -> int:
        """Number of batches that were defended, including the current one.

        Optimizer steps are not a substitute: there may be two per batch, or one per four batches. The trainer's number of batches is
        not either, because training may have begun without the defense. A batch counts once, even if the step is called several
        times on it, as with LBFGS.

        Args:
            trainer: the trainer that runs the batch.
            begun: number of batches that the trainer has begun.
            is_running: whether this batch is still running, so that a training resumed from a checkpoint of now would repeat it. Until
                it has ended, :meth:`state_dict` is the state before it. ``None`` if nobody can say.
        """
        if self.batches is None:  # a checkpoint of version 0.1.0, which had no count
            self.batches = begun - 1
        if self._counted != (id(trainer), begun):
            # First of all: a signal may write a checkpoint at any moment.
            self._before = None if is_running is None else (copy.deepcopy(self.state_dict()), is_running)
            self._counted = (id(trainer), begun)
            self.batches += 1
        return self.batches

    def batches_in_epochs_of(self, length: float) -> float:
        """Number of defended batches, including the current one, if all epochs so far had had so many batches.

        A run may be resumed on another number of processes, or with another batch size. Earlier batches then count as the part of an
        epoch that they were, so that a warm-up in epochs goes on where it stood.

        Args:
            length: number of batches in the current epoch.
        """
        batches = self.batches or 0
        before, added = self._warmup or (length, 0.0)
        if before != length:
            added = (batches - 1 + added) * length / before - (batches - 1)
        self._warmup = length, added
        return batches + added

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
            run,
            self.recorder,
            inputs,
            labels,
            compares=self.recipe.compares,
            pick=self.pick,
            whole=whole,
            wrapper=self.model,
        )

    def adversarial(self, passes: ForwardPasses, settings: StepSettings) -> Tensor:
        """Adversarial inputs ``(N, ...)`` of the recipe's attack; also updates an attack that learns, on all ranks alike.

        Args:
            passes: forward passes over the batch.
            settings: radius, noise and ranks.
        """
        attack = self.recipe.attack_at(settings.radius)
        if isinstance(attack, LearnedAttack) and self.multiplier is not None:
            attack = replace(attack, multiplier=self.multiplier)  # type: ignore[type-var]
        adversarial = passes.values  # of a rank that has no samples
        if len(passes.values):
            adversarial = passes.attack(attack, generator=settings.generator, execution=self.recipe.execution)
        else:
            attack.take_part(passes.values)
        if isinstance(attack, LearnedAttack):
            displacement = attack.displacement(passes.values, adversarial)
            displacement = settings.ranks.mean_of_samples(displacement, len(adversarial))
            self.multiplier = attack.updated_multiplier(displacement)
        return adversarial

    def learn(self, compared: Compared, labels: Any, settings: StepSettings) -> dict[str, Any]:
        """Train the recipe's critic, if it has one, on the detached features of a batch.

        Args:
            compared: the samples on which it is trained.
            labels: labels of the batch.
            settings: the noise of the critic, the ranks, and whether to measure.

        Returns:
            The critic's measurements, for the logs.
        """
        clean, adversarial = compared.clean, compared.adversarial
        if self.critic is None or clean is None or adversarial is None:
            return {}
        generator, ranks = settings.generator, settings.ranks
        if self.recipe.gather:
            # All ranks train on the same samples, so they need the same noise.
            generator = seeded_generator(clean.features.device, self.critic.config.seed, self.batches or 0)
        try:
            return self.critic.update(
                clean,
                adversarial,
                compared.labels(labels),
                generator=generator,
                average=ranks.mean if ranks.size > 1 else None,
                measure=settings.measure,
            )
        except ValueError:
            if clean.finite and adversarial.finite:
                raise
            return {}  # combine raises the error that names what diverged

    def learned(self) -> dict[str, float]:
        """The learned multiplier of the attack, for the logs."""
        return {} if self.multiplier is None else {"multiplier": self.multiplier}

    def state_dict(self) -> dict[str, Any]:
        """The learned state and the number of defended batches, for a checkpoint; while a Trainer runs a batch, those before it."""
        if self._before is not None and self._before[1]():
            return self._before[0]
        critic = None if self.critic is None else self.critic.state_dict()
        return {"batches": self.batches, "warmup": self._warmup, "multiplier": self.multiplier, "critic": critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. An empty state, of a training without the defense, means a new start."""
        state = state or UNTRAINED
        self.batches, self._counted, self._before = state.get("batches"), None, None
        self._warmup = state.get("warmup")
        self.multiplier = state.get("multiplier")
        if self.critic is not None:
            self.critic.load_state_dict(state.get("critic"))

    @contextlib.contextmanager
    def perturbed_weights(
        self,
        passes: ForwardPasses,
        adversarial: Tensor,
        ranks: Ranks,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Callable[[Tensor], None]]:
        """Context in which the weights are perturbed to increase the recipe's loss, if the recipe has ``awp``.

        Buffers and the random state do not change. The cost is that of a training step without the attack, in the model's own modes.
        All ranks perturb the weights alike, along the mean of their gradients.

        Args:
            passes: forward passes over the batch.
            adversarial: the adversarial inputs.
            ranks: the ranks that train the model together.
            task_loss: ``(outputs, labels) -> scalar``, the loss on the inputs of ``training_step``. Not used if the passes go through
                the step, which has its own loss. ``None`` for the recipe's task loss.
            generator: random generator of the recipe's noise.

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
                    clean = self._clean_pass(passes) if recipe.needs("clean") else None
                    attacked = passes.run(adversarial) if recipe.needs("adversarial") else None
                    seen = clean if recipe.sees == "clean" else attacked
                    assert seen is not None
                    loss = seen.loss
                    if loss is None:
                        loss = (task_loss or recipe.task_loss)(seen.outputs, passes.labels)
                    compared = self._compared(clean, attacked, ranks)
                    loss, _ = self.combine(loss, clean, attacked, passes, compared, generator)
                    steps = perturbation.ascent_steps(loss, ranks)
                perturbation.apply(steps)  # outside of that context, which would restore the weights
            yield until_backward
        except BaseException:
            waiting = False
            raise
        finally:
            if not waiting:
                perturbation.undo()

    def combine(
        self,
        task_loss: Tensor,
        clean: Branch | None,
        adversarial: Branch | None,
        passes: ForwardPasses,
        compared: Compared,
        generator: torch.Generator | None = None,
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
            lambda *_: self._discrepancy_of(compared, classes),
            slope=lambda one, other, found: self._slope(passes, one, other, found, generator),
            ranks=compared.ranks,
        )

    def _clean_pass(self, passes: ForwardPasses) -> Branch:
        """A forward pass over the clean inputs, which can be differentiated in them if the recipe has a Jacobian term."""
        if not self.recipe.jacobian_weight:
            return passes.run(passes.values)
        values = passes.values.detach().clone().requires_grad_()
        with eager():  # compiled code has no double backward
            return passes.run(values.clone())._replace(values=values)  # a copy, because the model may work in place

    def _slope(
        self,
        passes: ForwardPasses,
        clean: Branch,
        adversarial: Branch,
        discrepancy: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The recipe's Jacobian term, in features per data unit."""
        threat, features = passes.threat or self.recipe.threat, float32_or_better(clean.features)
        assert clean.values is not None
        assert threat is not None
        if self.recipe.jacobian_directions == "transport" and discrepancy is not None:
            directions = transport_directions(discrepancy, adversarial.features)
        else:
            generator = generator or seeded_generator(features.device, self.seed)
            directions = random_directions(features, generator)
        slopes = slopes_along(features, clean.values, directions)
        value = squared_slope(replace(threat, mean=None).to_model(slopes), features)
        if not self._doubly:
            check_double_backward(value, [each for each in self.model.parameters() if each.requires_grad])
            self._doubly = True
        return value

    def _compared(self, clean: Branch | None, adversarial: Branch | None, ranks: Ranks) -> Compared:
        """This rank's samples, or with ``gather`` the samples of all ranks."""
        own = Compared(clean, adversarial, ranks)
        if not (self.recipe.gather and self.recipe.weight > 0) or clean is None or adversarial is None:
            return own
        if ranks.size == 1:
            if not self._said_alone:
                self._said_alone = True
                warnings.warn(
                    "gather=True compares the samples of all processes, but there is one process: it changes nothing here.",
                    stacklevel=2,
                )
            return own
        sizes = ranks.row_counts(clean.features)
        one, other = (each._replace(features=ranks.gather(each.features, sizes)) for each in (clean, adversarial))
        if self.critic is not None and self.critic.config.by_class:  # the outputs say how many classes there are
            one = one._replace(outputs=ranks.gather(tensor_of(clean.outputs).detach(), sizes))
        return Compared(one, other, ranks, sizes)

    def _discrepancy_of(self, compared: Compared, labels: Any) -> Tensor:
        """The discrepancy between the compared samples, of which this rank has these labels."""
        clean, adversarial, ranks, sizes = compared
        assert clean is not None
        assert adversarial is not None
        labels = compared.labels(labels)
        if sizes is None:
            return self._measure(clean, adversarial, labels)
        with rows_shared(ranks, sizes):
            value = self._measure(clean, adversarial, labels)
        # The gradient is in this rank's own samples only. Data-parallel training averages the gradients of the ranks, where the value
        # needs their sum.
        return value + (ranks.size - 1) * (value - value.detach())

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

    def detach(self) -> None:
        """Remove the hooks from the model, and restore perturbed weights: the model is as it was before the binding."""
        self.recorder.detach()
        self.restore_weights()

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


def _bound(module: Any, forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A callable as a method of the module, so that code that runs it knows the module whose state it must preserve."""
    if isinstance(forward, nn.Module):
        return forward
    return MethodType(lambda _, inputs: forward(inputs), module)

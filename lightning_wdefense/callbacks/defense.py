"""The callback that makes a pipeline robust."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_wdefense._compat import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_wdefense._strategy import check_strategy
from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.attacks.threat import check_threat
from lightning_wdefense.callbacks.interception import intercept_training_step
from lightning_wdefense.callbacks.requirements import attacked_model, check_automatic_optimization, check_returns_loss
from lightning_wdefense.callbacks.restoration import add_restoring_callback
from lightning_wdefense.callbacks.route import Route
from lightning_wdefense.callbacks.schedule import batches_begun, is_logging_step, noise_generator, warmup_radius
from lightning_wdefense.callbacks.target import Target, Through
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.defense import UNTRAINED, Defense
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, picking
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.steps import Step, own_step


class WassersteinDefense(Callback):
    """Trains any LightningModule robustly, without a change to it.

    The module's ``training_step`` is called once a batch, with its own loss, logging and metrics; the recipe decides whether
    it sees the clean or the adversarial inputs, and adds its terms to the loss that comes back. Logged on every logger,
    under ``defense/``: the parts of the loss and the attack's current ``eps``; every ``log_every_n_steps`` also what the attack did
    (``clean_acc``, ``adversarial_acc``, ``attack_success``), the ``transport_cost`` between clean and adversarial features, and what a
    critic made of them (``critic_gap``, ``critic_distance``, ``critic_penalty``, ``critic_gradient_norm``, ``critic_steps``).

    Args:
        recipe: a name, see :meth:`Recipe.named`, or a :class:`Recipe`.
        threat: what the attacker may do; needed beside a name, and absent or equal beside a ``Recipe``.
        weight: replaces the recipe's weight of the discrepancy.
        features: replaces the recipe's: ``"outputs"``, ``"penultimate"``, or a dotted path to a submodule of the model.
        warmup_epochs: replaces the recipe's: epochs over which eps grows from 0 to the threat's.
        through: ``"model"`` has the adversary take plain forward passes of the model, and the other branch one; ``"step"`` has it climb
            the loss of ``training_step`` itself, whatever that does with the batch, and the other branch be one more call of it;
            ``"auto"`` takes the first where a look at the first batch shows that both compute the same, else the second.
        perturb: dotted path to a submodule, or a :class:`~lightning_wdefense.attacks.Perturb`, whose output is attacked in place of the
            inputs: embeddings of tokens or categories. Its norm and eps are in units of that output (``bounds=None``).
        model: dotted path to the submodule that takes the inputs and returns logits, where ``training_step`` calls that
            (``self.net(x)``) and not the module itself.
        inputs: where the inputs are in a batch: a position, key or attribute, a path (``"image.pixels"``, ``(0, 1)``), a list of several,
            or a callable that gets (``f(batch)``) and sets (``f(batch, inputs)``) them; by default found by convention.
        labels: the same for the labels, which only recipes that compare classes need.
        outputs: key, position or callable that finds the logits in what the model returns; ``"logits"`` and ``"out"`` are found.
        ignore_index: label of elements (pixels) that count for nothing, such as 255; beside it, -100 always is.
        seed: seeds the attack's noise, which depends only on it, the epoch, the batch and the rank.
        name: tells several of these callbacks apart, in the logs (``defense/{name}/``) and in checkpoints.

    Raises:
        ValueError: for an unknown recipe, a missing threat, or one that differs from the recipe's; in training, for
            inputs or labels that do not fit.
        MisconfigurationException: at the start of training, for manual optimisation (use
            :class:`~lightning_wdefense.WassersteinDefenseMixin`), or a strategy that shards the parameters.

    Example:
        >>> from lightning_wdefense import ThreatModel, WassersteinDefense
        >>> defense = WassersteinDefense("trades", threat=ThreatModel(eps=8 / 255), weight=3.0)
        >>> defense.recipe.weight
        3.0
    """

    def __init__(
        self,
        recipe: str | Recipe = "class-transport",
        *,
        threat: ThreatModel | None = None,
        weight: float | None = None,
        features: str | None = None,
        warmup_epochs: float | None = None,
        through: Through = "auto",
        perturb: str | Perturb | None = None,
        model: str | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
        outputs: Pick = None,
        ignore_index: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        changes = {"weight": weight, "features": features, "warmup_epochs": warmup_epochs}
        self.recipe = resolve_recipe(
            recipe, threat, {key: value for key, value in changes.items() if value is not None}
        )
        self.model, self.seed, self.name, self.through = model, seed, name, through
        self._target = Target.of(through, inputs, labels, perturb=perturb, outputs=outputs, ignore_index=ignore_index)
        self.perturb = self._target.perturb
        self._route = self._new_route()
        self._undo: list[Callable[[], None]] = []
        self._defense: Defense | None = None
        self._learned: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Identifies the callback in a checkpoint: by ``name`` alone."""
        return f"WassersteinDefense({self.name!r})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand between Lightning and the module's ``training_step``."""
        if stage != "fit":
            return
        self._restore()
        self._route = self._new_route()
        if not batches_begun(trainer):  # a fit that goes on with the same trainer goes on with what was learned
            self._learned = {}
        check_automatic_optimization(pl_module)
        check_strategy(trainer, "WassersteinDefense")
        if self.recipe.active:
            step = functools.partial(self._training_step, trainer, pl_module)
            self._undo = [intercept_training_step(pl_module, step)]

    def state_dict(self) -> dict[str, Any]:
        """What the recipe has learned, and how many batches it defended, for the checkpoint."""
        if self._defense is not None:
            return self._defense.state_dict()
        # Lightning passes an empty state over: a tuner, which saves before the first batch, would not restore this one.
        return self._learned or (UNTRAINED if self.recipe.active else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._learned = state_dict
        if self._defense is not None:  # a tuner takes back what its trial batches changed
            self._defense.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy stands before no module, and has what was learned.
        return self.__dict__ | {"_undo": [], "_defense": None, "_learned": copy.deepcopy(self.state_dict())}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that model and features exist (not earlier: ``configure_model`` may make them), and that the step can be attacked."""
        if self.recipe.active:
            self._bind(pl_module)
            check_returns_loss(own_step(pl_module, "training_step"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module back as it was (after an exception Lightning does not call ``teardown``)."""
        self._restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training ended before the attack had its full radius."""
        batches = None if self._defense is None else self._defense.batches
        if not batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        radius = warmup_radius(trainer, self.recipe.warmup_epochs, batches)
        if radius < 1:
            rank_zero_warn(
                f"Training ended in the warm-up of recipe {self.recipe.name!r}: the attack reached {radius:.0%} of "
                f"eps={self.recipe.eps:g}. Train longer or lower warmup_epochs={self.recipe.warmup_epochs:g}."
            )

    def _bind(self, pl_module: LightningModule) -> Defense:
        if self._defense is None:
            model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
            self._defense = Defense(self.recipe, model, picking(self._target.outputs))
            self._defense.load_state_dict(self._learned)
            self._undo += [self._defense.recorder.detach, self._defense.restore_weights]
        return self._defense

    def _new_route(self) -> Route:
        return Route(self._target, self.recipe.threat or ThreatModel())

    def _restore(self) -> None:
        self._learned = self.state_dict()
        while self._undo:
            self._undo.pop()()
        self._defense = None

    def _training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Callable[..., Any],
        batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        recipe, defense = self.recipe, self._bind(pl_module)
        own = Step(pl_module, own_step(pl_module, "training_step"), "training_step", args, kwargs)
        add_restoring_callback(trainer, defense, self._restore)
        batches = defense.count_batch(trainer, batches_begun(trainer))
        found = self._route.passes(own, defense, batch)
        if found is None:  # the user's way to skip a batch, before there was anything to look at
            return step(batch, *args, **kwargs)
        site, passes = found
        radius = warmup_radius(trainer, recipe.warmup_epochs, batches)
        generator = noise_generator(trainer, self.seed, site.values.device)
        average = functools.partial(trainer.strategy.reduce, reduce_op="mean")
        adversarial = defense.adversarial(passes, radius=radius, generator=generator, average=average)
        measured = defense.measure(passes, adversarial) if is_logging_step(trainer) else {}
        with defense.perturbed_weights(passes, adversarial) as until_backward:
            sees_clean = recipe.sees == "clean"
            place = contextlib.nullcontext(batch) if sees_clean else site.moved(adversarial)
            with passes.watch() as branch_of, place as seen_batch:
                seen_batch = seen_batch if sees_clean else map_tensors(seen_batch, torch.clone)
                result = step(seen_batch, *args, **kwargs)
            loss = result["loss"] if isinstance(result, dict) else result
            if loss is None:  # the user's way to skip a batch
                return result
            seen = branch_of(result)
            other: Branch | None = None
            if recipe.needs("adversarial" if sees_clean else "clean"):
                other = passes.run(adversarial if sees_clean else site.values)
            clean, attacked = (seen, other) if sees_clean else (other, seen)
            classes = passes.classes(seen)
            measured |= defense.learn(
                clean, attacked, classes, generator=generator, average=average, measure=bool(measured)
            )
            total, logs = defense.combine(loss, clean, attacked, passes)
            until_backward(total)
        if trainer.barebones:  # forbids logging, and would warn at every batch
            return {**result, "loss": total} if isinstance(result, dict) else total
        prefix = f"defense/{self.name}/" if self.name else "defense/"
        logs = {**logs, **measured, "eps": radius * recipe.eps, **defense.learned()}
        logged = {prefix + key: value for key, value in logs.items()}
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=site.size)
        return {**result, "loss": total} if isinstance(result, dict) else total


def resolve_recipe(recipe: str | Recipe, threat: ThreatModel | None, changes: dict[str, Any]) -> Recipe:
    """The recipe that a name or a recipe, a threat and single changes mean.

    Raises:
        TypeError: for what is no recipe or no threat model.
        ValueError: if a name comes without a threat, or a recipe with another one.
    """
    if not isinstance(recipe, (str, Recipe)):
        written = (
            f"WassersteinDefense(threat={recipe!r})"
            if isinstance(recipe, ThreatModel)
            else 'WassersteinDefense("pgd-at", threat=...)'
        )
        raise TypeError(f"recipe must be a recipe's name or a Recipe, got a {type(recipe).__name__}: write {written}.")
    if threat is not None:
        check_threat(threat, "WassersteinDefense")
    if isinstance(recipe, str):
        if threat is None:
            raise ValueError(
                f"threat= is needed beside the recipe's name {recipe!r}: WassersteinDefense({recipe!r}, threat=...)."
            )
        return Recipe.named(recipe, threat, **changes)
    if threat is not None and recipe.threat is not None and threat != recipe.threat:
        raise ValueError(
            f"threat={threat} differs from the recipe's own, {recipe.threat}: leave threat= out beside a Recipe."
        )
    return replace(recipe, **changes)

"""The callback that trains a LightningModule robustly."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_wdefense._compat import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.attacks.threat import check_threat
from lightning_wdefense.callbacks.interception import intercept_training_step
from lightning_wdefense.callbacks.requirements import attacked_model, check_automatic_optimization, check_returns_loss
from lightning_wdefense.callbacks.restoration import add_restoring_callback
from lightning_wdefense.callbacks.route import Route
from lightning_wdefense.callbacks.schedule import (
    batches_begun,
    check_batches,
    count_batch,
    is_logging_step,
    ranks_of,
    step_settings,
    warmup_radius,
)
from lightning_wdefense.callbacks.target import Target, Through
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.defense import UNTRAINED, Defense
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, output_picker
from lightning_wdefense.modules.parallel import check_strategy
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.steps import Step, unwrapped_step


class WassersteinDefense(Callback):
    """Trains any LightningModule robustly, without changes to the module.

    The callback calls the module's ``training_step`` once per batch, with the module's own loss, logging and metrics. The recipe
    decides whether ``training_step`` gets the clean or the adversarial inputs, and adds its terms to the returned loss.

    Logged on every logger, under ``defense/``, at every training step:

    - the parts of the loss, and the current perturbation budget ``eps`` of the attack (data units).

    Every ``log_every_n_steps`` also:

    - ``clean_acc``, ``adversarial_acc`` and ``attack_success``, which describe the attack on this batch;
    - ``transport_cost``, the Sinkhorn divergence between clean and adversarial features;
    - for recipes with a critic: ``critic_gap``, ``critic_distance``, ``critic_penalty``, ``critic_gradient_norm`` and ``critic_steps``.

    Args:
        recipe: a name, see :meth:`Recipe.named`, or a :class:`Recipe`.
        threat: the threat model. Required with a recipe's name. With a ``Recipe`` it must be absent or equal to the recipe's own.
        weight: replaces the recipe's weight of the discrepancy.
        features: replaces the recipe's features: ``"outputs"``, ``"penultimate"``, or a dotted path to a submodule of the model.
        warmup_epochs: replaces the recipe's number of warm-up epochs, in which eps grows from 0 to the threat model's eps.
        through: how the attack runs the model. ``"model"``: by plain forward passes of the model; the second branch is a forward pass
            too. ``"step"``: through ``training_step``; the attack maximises its loss, and the second branch is a second call of it.
            ``"auto"``: ``"model"`` if an inspection of the first batch shows that both compute the same, otherwise ``"step"``.
        perturb: dotted path to a submodule, or a :class:`~lightning_wdefense.attacks.Perturb`. The attack perturbs the output of
            this submodule instead of the inputs, such as embeddings of tokens or categories. Norm and eps of the threat model are
            then in units of that output (``bounds=None``).
        model: dotted path to the submodule that takes the inputs and returns logits. Needed if ``training_step`` calls this
            submodule (``self.net(x)``) and not the module itself.
        inputs: where the inputs are in a batch: a position, key or attribute, a path (``"image.pixels"``, ``(0, 1)``), a list of
            several of these, or a callable that gets (``f(batch)``) and sets (``f(batch, inputs)``) the inputs. By default they are
            found by convention.
        labels: the same for the labels. Only recipes that compare classes need labels.
        outputs: key, position or callable that finds the logits in the model's return value. ``"logits"`` and ``"out"`` are found
            without it.
        ignore_index: label of elements (pixels) that are left out, such as 255. Elements with label -100 are always left out.
        seed: seed of the attack's noise. The noise depends only on the seed, the number of the batch in the training, and the rank.
        name: distinguishes several of these callbacks, in the logs (``defense/{name}/``) and in checkpoints.

    Raises:
        ValueError: if the recipe is unknown, or the threat model is missing or differs from the recipe's own; in training, if
            inputs or labels do not fit.
        MisconfigurationException: at the start of training, for manual optimisation (use
            :class:`~lightning_wdefense.WassersteinDefenseMixin`), or for a strategy that shards the parameters.

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
        """Key of the callback in a checkpoint. It depends only on ``name``."""
        return f"WassersteinDefense({self.name!r})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the module's ``training_step`` by the robust training step."""
        if stage != "fit":
            return
        self._restore()
        self._route = self._new_route()
        if not batches_begun(trainer):  # a later fit with the same trainer continues with the learned state
            self._learned = {}
        check_automatic_optimization(pl_module)
        check_strategy(trainer, "WassersteinDefense", [] if self.recipe.attack is None else [self.recipe.attack])
        if self.recipe.active:
            step = functools.partial(self._training_step, trainer, pl_module)
            self._undo = [intercept_training_step(pl_module, step)]

    def state_dict(self) -> dict[str, Any]:
        """The recipe's learned state and its number of batches, for the checkpoint."""
        if self._defense is not None:
            return self._defense.state_dict()
        # Lightning skips an empty state. A tuner, which saves before the first batch, would then not restore this callback.
        return self._learned or (UNTRAINED if self.recipe.active else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._learned = state_dict
        if self._defense is not None:  # a tuner undoes what its trial batches changed
            self._defense.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is attached to no module, and keeps the learned state.
        return self.__dict__ | {"_undo": [], "_defense": None, "_learned": copy.deepcopy(self.state_dict())}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the model and the features exist, and that ``training_step`` can be attacked.

        Not earlier, because ``configure_model`` may create the submodules.
        """
        if self.recipe.active:
            self._bind(pl_module)
            check_returns_loss(unwrapped_step(pl_module, "training_step"))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks have equally many batches, before the first of them."""
        if self.recipe.active:
            check_batches(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's own ``training_step``."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's own ``training_step`` (after an exception Lightning does not call ``teardown``)."""
        self._restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if training ended before the attack reached the threat model's eps."""
        defense = self._defense
        if defense is None or not defense.batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        radius = warmup_radius(trainer, defense)
        if radius < 1:
            rank_zero_warn(
                f"Training ended in the warm-up of recipe {self.recipe.name!r}: the attack reached {radius:.0%} of "
                f"eps={self.recipe.eps:g}. Train for more epochs, or lower warmup_epochs={self.recipe.warmup_epochs:g}."
            )

    def _bind(self, pl_module: LightningModule) -> Defense:
        if self._defense is None:
            model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
            self._defense = Defense(self.recipe, model, output_picker(self._target.outputs))
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
        own = Step(pl_module, unwrapped_step(pl_module, "training_step"), "training_step", args, kwargs)
        add_restoring_callback(trainer, defense, self._restore)
        count_batch(trainer, defense)
        found = self._route.passes(own, defense, batch, ranks_of(trainer))
        if found is None:  # the step returned no loss (the user skips the batch), and no batch was inspected before
            return step(batch, *args, **kwargs)
        site, passes = found
        result: Any = None

        def run_step(values: torch.Tensor) -> tuple[torch.Tensor, Branch] | None:
            """The user's own step, called once, on the clean batch or on the batch with the adversarial values."""
            nonlocal result
            sees_clean = recipe.sees == "clean"
            place = contextlib.nullcontext(batch) if sees_clean else site.perturbed(values)
            with passes.record_step() as branch_of, place as seen_batch:
                seen_batch = seen_batch if sees_clean else map_tensors(seen_batch, torch.clone)
                result = step(seen_batch, *args, **kwargs)
            loss = result["loss"] if isinstance(result, dict) else result
            return None if loss is None else (loss, branch_of(result))

        settings = step_settings(
            trainer,
            self.seed,
            site.values.device,
            radius=warmup_radius(trainer, defense),
            measure=is_logging_step(trainer),
        )
        output = defense.step(passes, run_step, settings)
        if output is None:  # the user skips the batch
            return result
        if not trainer.barebones:  # such a trainer forbids logging, and would warn at every batch
            prefix = f"defense/{self.name}/" if self.name else "defense/"
            logged = {prefix + key: value for key, value in output.logs.items()}
            pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=site.size)
        return {**result, "loss": output.loss} if isinstance(result, dict) else output.loss


def resolve_recipe(recipe: str | Recipe, threat: ThreatModel | None, changes: dict[str, Any]) -> Recipe:
    """The recipe that the arguments of :class:`WassersteinDefense` describe.

    Args:
        recipe: a recipe or its name.
        threat: the threat model.
        changes: fields of the recipe to replace.

    Raises:
        TypeError: if ``recipe`` is no recipe, or ``threat`` is no threat model.
        ValueError: if a name has no threat model, or a ``Recipe`` has a different one.
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
                f"The recipe's name {recipe!r} needs a threat model: WassersteinDefense({recipe!r}, threat=...)."
            )
        return Recipe.named(recipe, threat, **changes)
    if threat is not None and recipe.threat is not None and threat != recipe.threat:
        raise ValueError(
            f"threat={threat} differs from the threat model of the recipe, {recipe.threat}. A Recipe has its own threat model: leave "
            "threat= out."
        )
    return replace(recipe, **changes)

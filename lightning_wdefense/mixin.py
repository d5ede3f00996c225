"""A mixin for LightningModules that run the robust training step in their own ``training_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._compat import is_a
from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.callbacks.restoration import add_restoring_callback
from lightning_wdefense.callbacks.schedule import count_batch, is_logging_step, step_settings, warmup_radius
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.recipe import Recipe
from lightning_wdefense.defenses.step import DefenseOutput, StepSettings
from lightning_wdefense.modules.attachments import exclude_from_copies

_CHECKPOINT_KEY = "wasserstein_defense"


class WassersteinDefenseMixin:
    """Gives a LightningModule the method ``self.defend(inputs, labels)``, for automatic and manual optimisation.

    The mixin has no ``__init__``. List it before ``LightningModule``. The module's ``forward`` must map inputs to logits.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_wdefense import Recipe, ThreatModel, WassersteinDefenseMixin
        >>> class Classifier(WassersteinDefenseMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def configure_defense(self):
        ...         return Recipe.named("sat", ThreatModel(eps=0.1))
        ...     def training_step(self, batch, batch_idx):
        ...         output = self.defend(*batch)
        ...         self.log_dict({f"defense/{key}": value for key, value in output.logs.items()})
        ...         return output.loss
        >>> sorted(Classifier().defend(torch.rand(8, 4), torch.arange(8) % 3).logs)
        ['discrepancy', 'eps', 'loss', 'task_loss']
    """

    _defense: Defense | dict[str, Any] | None = None

    def configure_defense(self) -> Recipe:
        """Return the recipe. Must be overridden. It is called once, at the first :meth:`defend`.

        Raises:
            NotImplementedError: if the module does not override it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define configure_defense(self). It returns a Recipe, such as "
            'Recipe.named("class-transport", threat).'
        )

    def task_loss(self, outputs: Any, labels: Any) -> Tensor:
        """The task loss, a scalar. By default the task loss of the recipe, which is cross-entropy."""
        return self.defense.recipe.task_loss(outputs, labels)

    @property
    def defense(self) -> Defense:
        """The :class:`~lightning_wdefense.defenses.defense.Defense` of this module, created at the first use."""
        found = self._defense
        if not isinstance(found, Defense):
            defense = Defense(self.configure_defense(), self)  # type: ignore[arg-type]
            defense.load_state_dict(found or {})  # in a copy of a module: the learned state of the original
            # Not nn.Module.__setattr__, which would register the recorder's model (this module) as its own child.
            object.__setattr__(self, "_defense", found := defense)
            exclude_from_copies(self)  # type: ignore[arg-type]
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the recipe's learned state in the checkpoint. An override must call ``super()``."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[_CHECKPOINT_KEY] = self.defense.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the recipe's learned state. An override must call ``super()``."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self.defense.load_state_dict(checkpoint.get(_CHECKPOINT_KEY, {}))

    @torch.compiler.disable  # the attack's loop runs eagerly; a compiled forward is still called compiled
    def defend(
        self, inputs: Tensor, labels: Any, *, forward: Callable[[Tensor], Any] | None = None, seed: int = 0
    ) -> DefenseOutput:
        """Attack the batch and compute the recipe's loss on it.

        With a recipe that has ``awp``, the weights are still perturbed when this returns. They are restored when the backward pass of
        the loss ends. If there is no backward pass, a Trainer restores them at the end of the batch; in your own training loop, call
        ``self.defense.restore_weights()``.

        Args:
            inputs: clean inputs ``(N, ...)`` in model units.
            labels: labels in the form that the attack and :meth:`task_loss` accept.
            forward: maps inputs to outputs, if the module itself does not: a submodule (``self.discriminator``), or a callable that
                passes the module its other arguments, ``lambda x: self(x, mask)``.
            seed: seed of the attack's noise; with a Trainer, together with the number of the batch in the training and the rank.

        Returns:
            The loss, outputs, adversarial inputs and logs.

        Raises:
            TypeError: if inputs or outputs are of a type that cannot be attacked, such as a tuple of inputs.
            ValueError: if inputs or labels do not fit the threat model or the outputs.
            FloatingPointError: if a part of the loss is NaN or infinite; the message names the part.
        """
        defense = self.defense
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"defend() attacks one tensor, got a {type(inputs).__name__}. If the model takes several arguments, attack one of them and bind "
                "the others: self.defend(x, labels, forward=lambda x: self(x, mask))."
            )
        trainer = getattr(self, "_trainer", None)
        if trainer is None or not is_a(trainer, "Trainer"):
            settings = StepSettings(generator=seeded_generator(inputs.device, seed))
        else:
            radius, measure = _radius(defense, trainer), trainer.training and is_logging_step(trainer)
            settings = step_settings(trainer, seed, inputs.device, radius=radius, measure=measure)
            if defense.recipe.awp > 0:
                add_restoring_callback(trainer, defense, defense.restore_weights)
        return defense.run(inputs, labels, settings, forward=forward, task_loss=self.task_loss)


def _radius(defense: Defense, trainer: Any) -> float:
    """Fraction of eps that the attack has: of the warm-up in training; otherwise 1, so that validations can be compared."""
    if not (trainer.training and defense.recipe.active):
        return 1.0
    count_batch(trainer, defense)
    return warmup_radius(trainer, defense)

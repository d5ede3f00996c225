"""Restores perturbed weights and the module in time, even if a training step fails or skips its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_wdefense._compat import Callback, LightningModule, Trainer, is_a
from lightning_wdefense.defenses.defense import Defense


def add_restoring_callback(trainer: Trainer, defense: Defense, finish: Callable[[], None]) -> None:
    """Add a callback to the trainer that undoes a defense's changes to its module, until the run ends or fails.

    Perturbed weights are restored before the optimizer steps, and at the end of the batch. The second time is needed for a step
    that skips its backward pass.

    Args:
        trainer: the trainer that runs the step.
        defense: the defense that changes the weights.
        finish: called when the run ends or fails.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(each, _RestoringCallback) and each.defense is defense for each in callbacks):
        return
    # In front, so that no other callback sees perturbed weights or fails before it. Only the learning rate finder's own callback
    # stays before it, because the finder looks for its callback there. The finder also replaces the trainer's list by one without
    # our callback. A new list, because Lightning may be iterating over the old one.
    place = sum(is_a(each, "_LRCallback") for each in callbacks)
    trainer.callbacks = [*callbacks[:place], _RestoringCallback(defense, finish), *callbacks[place:]]  # type: ignore[attr-defined]


class _RestoringCallback(Callback):
    """A callback, not hooks of the module: users override those without calling ``super()``."""

    def __init__(self, defense: Defense, finish: Callable[[], None]) -> None:
        self.defense, self._finish = defense, finish

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A signal may ask for a checkpoint in the middle of a step, which then goes on with its perturbed weights.
        self.defense.perturbation.undo_in(checkpoint["state_dict"])

    def on_after_backward(self, *args: Any) -> None:
        self.defense.restore_weights()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.defense.restore_weights()

    def on_train_batch_end(self, *args: Any) -> None:
        self.defense.restore_weights()

    def on_validation_batch_end(self, *args: Any) -> None:
        self.defense.restore_weights()

    def on_test_batch_end(self, *args: Any) -> None:
        self.defense.restore_weights()

    def on_predict_batch_end(self, *args: Any) -> None:
        self.defense.restore_weights()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str = "") -> None:
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        self.defense.restore_weights()
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module)

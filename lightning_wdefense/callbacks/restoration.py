"""What a defended step changes for a while is undone in time, whatever else fails or never comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_wdefense._compat import Callback, LightningModule, Trainer, is_a
from lightning_wdefense.defenses.defense import Defense


def add_restoring_callback(trainer: Trainer, defense: Defense, finish: Callable[[], None]) -> None:
    """Have a trainer undo what a defense does to its module, from now until its run ends or fails.

    Perturbed weights come back before an optimizer steps, and with the end of the batch; a step that skips its backward pass leaves them.

    Args:
        trainer: whose step it is.
        defense: at work in the step.
        finish: called when the run ends or fails.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(each, _RestoringCallback) and each.defense is defense for each in callbacks):
        return
    # In front, so that no other callback meets perturbed weights, nor fails before it; the learning rate finder looks for its own there. It
    # puts another list in place of the trainer's, in which not even the callback is that is at work. A new list, for Lightning may be
    # walking along the old one.
    place = sum(is_a(each, "_LRCallback") for each in callbacks)
    trainer.callbacks = [*callbacks[:place], _RestoringCallback(defense, finish), *callbacks[place:]]  # type: ignore[attr-defined]


class _RestoringCallback(Callback):
    """Hooks of the module's own would not do: users override them without ``super()``."""

    def __init__(self, defense: Defense, finish: Callable[[], None]) -> None:
        self.defense, self._finish = defense, finish

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

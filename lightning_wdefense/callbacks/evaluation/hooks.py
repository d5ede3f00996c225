"""Lightning's hooks around validation and test, which are twins, as one set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_wdefense._compat import Callback, LightningModule, Trainer

Stage = Literal["validation", "test"]

PREFIX: dict[Stage, str] = {"validation": "val", "test": "test"}
"""What the keys of a stage begin with, as in Lightning's own examples."""


class EvaluationHooks(Callback):
    """A callback that does the same in validation and test: what it does is told the stage."""

    def _epoch_starts(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """An epoch of evaluation begins."""

    def _batch_starts(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """The module's own step is about to take a batch."""

    def _batch_ends(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """The module's own step has taken a batch, and may have written to it."""

    def _epoch_ends(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """An epoch of evaluation has ended."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with validation."""
        self._epoch_starts(trainer, pl_module, "validation")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the test."""
        self._epoch_starts(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See a validation batch as it is before the step."""
        self._batch_starts(trainer, pl_module, "validation", batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See a test batch as it is before the step."""
        self._batch_starts(trainer, pl_module, "test", batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Go on after the step on a validation batch."""
        self._batch_ends(trainer, pl_module, "validation", batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Go on after the step on a test batch."""
        self._batch_ends(trainer, pl_module, "test", batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish validation."""
        self._epoch_ends(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the test."""
        self._epoch_ends(trainer, pl_module, "test")


def batches_of(trainer: Trainer, stage: Stage) -> Sequence[float]:
    """How many batches of each dataloader are run in this stage, or in the sanity check."""
    if stage == "test":
        return trainer.num_test_batches
    return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches

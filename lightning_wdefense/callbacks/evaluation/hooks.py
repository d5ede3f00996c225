"""Lightning's hooks for validation and test as one set of methods that get the stage as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_wdefense._compat import Callback, LightningModule, Trainer

Stage = Literal["validation", "test"]

PREFIX: dict[Stage, str] = {"validation": "val", "test": "test"}
"""First part of the logged keys of each stage, as in Lightning's own examples."""


class EvaluationHooks(Callback):
    """A callback that does the same in validation and in test. Its methods get the stage as an argument."""

    def _epoch_starts(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Called when an evaluation epoch starts."""

    def _batch_starts(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Called before the module's own step runs on a batch."""

    def _batch_ends(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Called after the module's own step has run on a batch, which it may have modified."""

    def _epoch_ends(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Called when an evaluation epoch has ended."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a validation epoch."""
        self._epoch_starts(trainer, pl_module, "validation")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a test epoch."""
        self._epoch_starts(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Handle a validation batch before the step."""
        self._batch_starts(trainer, pl_module, "validation", batch, batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Handle a test batch before the step."""
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
        """Handle a validation batch after the step."""
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
        """Handle a test batch after the step."""
        self._batch_ends(trainer, pl_module, "test", batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a validation epoch."""
        self._epoch_ends(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a test epoch."""
        self._epoch_ends(trainer, pl_module, "test")


def batches_of(trainer: Trainer, stage: Stage) -> Sequence[float]:
    """Number of batches of each dataloader in this stage, or in the sanity check."""
    if stage == "test":
        return trainer.num_test_batches
    return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches

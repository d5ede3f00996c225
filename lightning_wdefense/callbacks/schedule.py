"""Where training stands: the attack's radius in its warm-up, and noise that a resumed run draws again."""

from __future__ import annotations

import math

import torch

from lightning_wdefense._compat import MisconfigurationException, Trainer
from lightning_wdefense._seeding import seeded_generator


def noise_generator(trainer: Trainer, seed: int, device: torch.device) -> torch.Generator:
    """A generator for the attack on the current batch, seeded by (seed, epoch, batch, rank).

    Lightning does not restore the global random state when a run is resumed, and ``global_step`` stands still while
    gradients accumulate.
    """
    return seeded_generator(device, seed, trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.global_rank)


def evaluation_generator(
    trainer: Trainer, seed: int, batch_idx: int, dataloader_idx: int, device: torch.device
) -> torch.Generator:
    """A generator for an attack on an evaluation batch: the same in every epoch, so that epochs can be compared."""
    return seeded_generator(device, seed, dataloader_idx, batch_idx, trainer.global_rank)


def is_due(trainer: Trainer, last: int | None, every_n_epochs: int) -> bool:
    """Whether what is done every so many training epochs, and was last done in epoch ``last``, is due in this evaluation.

    Outside of ``fit`` it always is. ``current_epoch % every_n_epochs`` would not do: with ``check_val_every_n_epoch`` there may
    never be a validation in such an epoch.
    """
    in_fit = getattr(trainer.state.fn, "value", trainer.state.fn) == "fit"
    return not in_fit or last is None or not 0 < trainer.current_epoch - last < every_n_epochs


def batches_begun(trainer: Trainer) -> int:
    """How many training batches this trainer has begun, in all epochs: not ``global_step``, which counts optimizer steps."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def warmup_radius(trainer: Trainer, warmup_epochs: float, batches: int) -> float:
    """Fraction of the full radius in the last of so many defended batches: linear over ``warmup_epochs``.

    Raises:
        MisconfigurationException: if the training dataloader has no length.
    """
    if warmup_epochs == 0:
        return 1.0
    epoch = trainer.num_training_batches
    if math.isinf(epoch):
        raise MisconfigurationException(
            f"A warm-up of warmup_epochs={warmup_epochs} needs to know how long an epoch is, but the training dataloader has no "
            "length: set Trainer(limit_train_batches=...), or warmup_epochs=0."
        )
    return min(1.0, batches / max(warmup_epochs * epoch, 1.0))


def is_logging_step(trainer: Trainer) -> bool:
    """Whether what is logged in the current batch will reach the loggers, by Lightning's own rule.

    It counts the batches after which gradients were not accumulated further, whatever the number of optimizers.
    """
    if not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    automatic = trainer.lightning_module.automatic_optimization
    return not (automatic and trainer.fit_loop._should_accumulate())


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the metrics of this moment."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)

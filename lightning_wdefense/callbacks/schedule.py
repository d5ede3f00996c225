"""The training schedule: warm-up of eps, epochs to measure, logging steps, and noise that a resumed run reproduces."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from lightning_wdefense._compat import MisconfigurationException, Trainer
from lightning_wdefense._ranks import ALONE, Ranks
from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.step import StepSettings


def noise_generator(trainer: Trainer, seed: int, device: torch.device) -> torch.Generator:
    """A generator for the attack on the current batch, seeded by (seed, number of the batch in the training, rank).

    Lightning does not restore the global random state when a run is resumed, and ``global_step`` does not change while
    gradients accumulate. So neither can give the noise. Batches are counted when they are completed, so one that was interrupted gets
    the same noise when it is run again.
    """
    batch = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return seeded_generator(device, seed, batch, trainer.global_rank)


def evaluation_generator(
    trainer: Trainer, seed: int, batch_idx: int, dataloader_idx: int, device: torch.device
) -> torch.Generator:
    """A generator for an attack on an evaluation batch: the same in every epoch, so that epochs can be compared."""
    return seeded_generator(device, seed, dataloader_idx, batch_idx, trainer.global_rank)


def is_due(trainer: Trainer, last: int | None, every_n_epochs: int) -> bool:
    """Whether a measurement that is made every ``n`` training epochs, last in epoch ``last``, is due in this evaluation.

    Outside of ``fit`` it is always due. ``current_epoch % every_n_epochs == 0`` is not a sufficient rule: with
    ``check_val_every_n_epoch`` there may be no validation in such an epoch.
    """
    in_fit = getattr(trainer.state.fn, "value", trainer.state.fn) == "fit"
    return not in_fit or last is None or not 0 < trainer.current_epoch - last < every_n_epochs


def count_batch(trainer: Trainer, defense: Defense) -> None:
    """Count the trainer's current batch as defended, once."""
    begun = batches_begun(trainer)
    defense.count_batch(trainer, begun, functools.partial(is_running, trainer, begun))


def validation_begins(checkpoint: dict[str, Any]) -> None:
    """Set a checkpoint that was written in the middle of a validation to its first batch.

    Otherwise a resumed run would skip this validation, or stop it as many batches earlier as had been done: Lightning begins again with
    the first batch, and counts those that were done before. What is logged at the end of the epoch would be missing, or be of a part of
    the data.

    Args:
        checkpoint: a checkpoint of Lightning's, which is changed.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.val_loop.batch_progress")
    if progress is not None:
        # In the first batch: at none, Lightning would take the validation for one that has ended.
        for part in ("total", "current"):
            progress[part] = {**progress[part], "ready": 1, "started": 1, "processed": 0, "completed": 0}
        progress["is_last_batch"] = False


def batches_begun(trainer: Trainer) -> int:
    """Number of training batches that this trainer has begun, over all epochs (``global_step`` counts optimizer steps instead)."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def is_running(trainer: Trainer, begun: int) -> bool:
    """Whether a batch is still running, so that a training resumed from a checkpoint of now repeats it.

    Args:
        trainer: the trainer.
        begun: number of batches that the trainer had begun when the batch began, including it.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches_begun(trainer) == begun and progress.processed < progress.ready


def warmup_radius(trainer: Trainer, defense: Defense) -> float:
    """Fraction of eps that the attack has in the warm-up, from 0 to 1: linear over the recipe's ``warmup_epochs``.

    Args:
        trainer: the trainer.
        defense: the defense, which has counted the current batch.

    Raises:
        MisconfigurationException: if the training dataloader has no length.
    """
    warmup_epochs = defense.recipe.warmup_epochs
    if warmup_epochs == 0:
        return 1.0
    epoch = trainer.num_training_batches
    if math.isinf(epoch):
        raise MisconfigurationException(
            f"A warm-up of warmup_epochs={warmup_epochs} needs the number of batches in an epoch, but the training dataloader has no "
            "length: set Trainer(limit_train_batches=...), or warmup_epochs=0."
        )
    batches = defense.batches_in_epochs_of(epoch)
    return min(1.0, batches / max(warmup_epochs * epoch, 1.0))


def step_settings(trainer: Trainer, seed: int, device: torch.device, *, radius: float, measure: bool) -> StepSettings:
    """What a robust training step on the current batch has to know.

    Args:
        trainer: the trainer.
        seed: seed of the attack's noise.
        device: device of the inputs.
        radius: factor on the attack's eps.
        measure: whether to measure what the attack did.
    """
    return StepSettings(radius, noise_generator(trainer, seed, device), ranks_of(trainer), measure)


def ranks_of(trainer: Trainer) -> Ranks:
    """The ranks that train together under a trainer."""
    return Ranks.current() if trainer.world_size > 1 else ALONE


def check_batches(trainer: Trainer) -> None:
    """Check that all ranks will see equally many training batches: a rank that has more of them would wait for the others forever.

    Raises:
        MisconfigurationException: if the numbers differ; the message lists them.
    """
    batches, device = float(trainer.num_training_batches), trainer.strategy.root_device
    numbers = ranks_of(trainer).numbers(batches if math.isfinite(batches) else -1.0, device)
    if len(set(numbers)) > 1:
        listed = ", ".join(f"rank {rank}: {'unknown' if n < 0 else int(n)}" for rank, n in enumerate(numbers))
        raise MisconfigurationException(
            f"The ranks have different numbers of training batches ({listed}), so that one would wait for the others forever. Use a "
            "DistributedSampler, which makes them equal (the default for map-style datasets), or Trainer(limit_train_batches=...)."
        )


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the values logged in the current batch reach the loggers, by Lightning's own rule.

    Lightning counts the batches that end an accumulation of gradients, for any number of optimizers.
    """
    if not (trainer._logger_connector.should_update_logs or trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    automatic = trainer.lightning_module.automatic_optimization
    return not (automatic and trainer.fit_loop._should_accumulate())


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs metrics now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)

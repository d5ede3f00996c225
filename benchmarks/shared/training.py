"""Training with a recipe: a real Trainer with the public callbacks, and a clock that sees training steps alone."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared.accuracy import CHUNK
from benchmarks.shared.data import Images
from benchmarks.shared.files import scratch
from benchmarks.shared.models import Classifier
from benchmarks.shared.protocol import Protocol
from benchmarks.shared.variants import Variant
from lightning_wdefense import Recipe, RobustnessMonitor, WassersteinDefense
from lightning_wdefense.attacks import PGD, Execution

SETTLING = 3
"""First steps, which are left out of the median step time."""
SMOKE_IMAGES = 16

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*(LeafSpec|treespec).*")


class StepClock(L.Callback):
    """Seconds of each training step, by the wall and of this process's cores, which other processes do not slow."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._start = self._now(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        wall, cpu = self._now(pl_module)
        self.wall.append(wall - self._start[0])
        self.cpu.append(cpu - self._start[1])

    @staticmethod
    def _now(module: L.LightningModule) -> tuple[float, float]:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {"steps": len(self.wall)}
        for name, seconds in (("wall", self.wall), ("cpu", self.cpu)):
            settled = seconds[SETTLING:] or seconds
            summary |= {
                f"{name}_s": round(sum(seconds), 3),
                f"{name}_step_ms": round(1e3 * statistics.median(settled), 3),
            }
        return summary


class ChosenEpoch(ModelCheckpoint):
    """Keeps the most robust of the epochs that were trained at the full radius, and the history of all."""

    def __init__(self, folder: str, first_epoch: int) -> None:
        super().__init__(folder, "{epoch}", monitor="val/robust_acc", mode="max", save_on_train_epoch_end=False)
        self.first_epoch = first_epoch
        self.history: list[float] = []

    def on_validation_end(self, trainer, pl_module):
        self.history.append(round(float(trainer.callback_metrics["val/robust_acc"]), 4))
        if trainer.current_epoch >= self.first_epoch:
            super().on_validation_end(trainer, pl_module)


def prepared(variant: Variant, protocol: Protocol, **changes: Any) -> Recipe:
    """The variant's recipe under the protocol."""
    if protocol.warmup_epochs is not None:
        changes = {"warmup_epochs": protocol.warmup_epochs} | changes
    if protocol.attack_precision == "bf16":
        changes = {"execution": Execution(precision="bf16")} | changes
    return replace(variant.recipe(protocol.threat), **changes)


def loader(images: Images, batch_size: int, seed: int | None = None) -> DataLoader:
    """With a seed: for training, shuffled in the same way for every recipe, with no smaller batch at the end."""
    batch_size, dataset = min(batch_size, len(images.y)), TensorDataset(*images)
    if seed is None:
        return DataLoader(dataset, batch_size)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=generator)


def trainer(protocol: Protocol, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if protocol.device == "cuda" else "cpu", devices=1, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"enable_checkpointing": False} | options,
    )  # fmt: skip


def averaging(variant: Variant, protocol: Protocol) -> list[L.Callback]:
    """Lightning's callback, if the variant averages: validation and checkpoints then use the averaged weights."""
    if not variant.averaged:
        return []
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging
    except ImportError as error:
        raise ValueError(f"{variant.label!r} needs lightning 2.6 or later, which has EMAWeightAveraging.") from error
    return [EMAWeightAveraging(decay=protocol.ema_decay)]


def train(
    variant: Variant, protocol: Protocol, train: Images, validation: Images, seed: int, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """How the training went, and the chosen epoch's weights; checkpoints lie in the folder while it goes on.

    A run whose loss or outputs stop being finite has no weights: its record holds ``diverged``, with the reason.
    """
    L.seed_everything(seed, verbose=False)
    recipe, module, clock = prepared(variant, protocol), Classifier(protocol), StepClock()
    judge = PGD(protocol.threat, steps=protocol.validation_steps)
    with scratch(folder) as checkpoints:
        chosen = ChosenEpoch(str(checkpoints), protocol.first_epoch(recipe.warmup_epochs))
        monitor = RobustnessMonitor(protocol.threat, {"pgd": judge}, features=None, progress=False)
        # The clock is last but for the checkpoint, so that what the others do after a step counts.
        callbacks = [*averaging(variant, protocol), WassersteinDefense(recipe, seed=seed), monitor, clock, chosen]
        fit = trainer(protocol, callbacks, max_epochs=protocol.epochs, enable_checkpointing=True)
        began = time.perf_counter()
        try:
            fit.fit(module, loader(train, protocol.batch_size, seed), loader(validation, CHUNK))
        except Exception as error:
            if not (isinstance(error, FloatingPointError) or _diverged(module, train.first(CHUNK))):
                raise
            return {"diverged": str(error), **clock.summary()}, None
        total = time.perf_counter() - began
        checkpoint = torch.load(chosen.best_model_path, map_location="cpu", weights_only=True)
    done = {
        **clock.summary(),
        "total_wall_s": round(total, 3),
        "chosen_epoch": checkpoint["epoch"],
        "validation_pgd": chosen.history,
        "recipe_repr": repr(recipe),
    }
    return done, checkpoint["state_dict"]


def _diverged(module: Classifier, images: Images) -> bool:
    """Attacks, transport and metrics complain of outputs that are not finite, each in its own way."""
    with torch.no_grad():
        return not bool(module(images.x.to(module.device)).isfinite().all())


def classifier(weights: dict[str, Tensor], protocol: Protocol) -> Classifier:
    """As it was trained."""
    module = Classifier(protocol)
    module.load_state_dict(weights)
    return module.eval().to(protocol.device)


def steps(
    variant: Variant, protocol: Protocol, module: Classifier, images: Images, count: int, seed: int = 0
) -> StepClock:
    """So many training steps at the full radius, timed."""
    clock, recipe = StepClock(), prepared(variant, protocol, warmup_epochs=0.0)
    callbacks = [*averaging(variant, protocol), WassersteinDefense(recipe, seed=seed), clock]
    batches = len(images.y) // min(protocol.batch_size, len(images.y))
    fit = trainer(protocol, callbacks, max_steps=count, max_epochs=math.ceil(count / batches))
    fit.fit(module, loader(images, protocol.batch_size, seed))
    return clock


def check(variant: Variant, protocol: Protocol, images: Images) -> None:
    """One small training step, so that what cannot run says so before anything long has begun.

    Raises:
        ValueError: if the recipe does not run on this task.
    """
    averaging(variant, protocol)
    try:
        L.seed_everything(0, verbose=False)
        steps(variant, protocol, Classifier(protocol), images.first(SMOKE_IMAGES), 1)
    except Exception as error:
        raise ValueError(
            f"{variant.label!r} does not run on {protocol.dataset}: {type(error).__name__}: {error}"
        ) from error

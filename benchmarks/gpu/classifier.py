"""The classifier of the stages that train, and batches that never leave the card."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.models import augment, preact_resnet18

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message=".*(LeafSpec|treespec).*")


def network(rehearse: bool) -> nn.Module:
    """PreAct ResNet-18 in channels-last layout, or a toy."""
    if rehearse:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 10),
        )
    return preact_resnet18().to(memory_format=torch.channels_last)


class Classifier(L.LightningModule):
    """An ordinary module, in which nothing knows of attacks: SGD, one cycle of the learning rate."""

    def __init__(self, net: nn.Module, lr: float = 0.2) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OnCard:
    """Shuffled batches of images that lie on the device, moved and mirrored at random if asked for."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, seed: int, *, augmented: bool = False) -> None:
        self.x, self.y, self.batch, self.augmented = x, y, min(batch, len(y)), augmented
        self.generator = torch.Generator(x.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y), generator=self.generator, device=self.x.device)
        for index in order[: len(self) * self.batch].split(self.batch):
            x = self.x[index]
            x = augment(x) if self.augmented else x
            yield x.contiguous(memory_format=torch.channels_last), self.y[index]


def trainer(device: torch.device, precision: str, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """Without a logger, checkpoints, validation and bars."""
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision=precision, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip


class Clock(L.Callback):
    """Looks at the clock every so many steps, and makes the host wait for the device only then.

    Args:
        warm: steps before, in which things happen for the first time.
        block: steps between two looks.
    """

    def __init__(self, warm: int, block: int) -> None:
        self.warm, self.block = warm, block
        self.times: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step - self.warm
        if step >= 0 and step % self.block == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of a step, in each block."""
        return [(end - start) / self.block for start, end in zip(self.times, self.times[1:], strict=False)]

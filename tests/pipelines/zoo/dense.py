"""A label, or a value, for each pixel."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.data import generator, loaders
from pipelines.pipeline import Pipeline, regressor
from support.lightning_modules import digits

IGNORED = 255


class Segmenter(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1))
        self.criterion = nn.CrossEntropyLoss(ignore_index=IGNORED)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        image, mask = batch
        return self.criterion(self(image), mask)

    def validation_step(self, batch, batch_idx):
        image, mask = batch
        logits = self(image)
        self.log("val_loss", self.criterion(logits, mask))
        self.log("val_miou", mean_iou(logits, mask))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def mean_iou(logits: Tensor, mask: Tensor) -> Tensor:
    predicted, counted = logits.argmax(1), mask != IGNORED
    ious = []
    for label in range(2):
        inside, true = (predicted == label) & counted, (mask == label) & counted
        ious.append((inside & true).sum() / (inside | true).sum())
    return torch.stack(ious).mean()


class Denoiser(L.LightningModule):
    """Pairs of noisy and clean images."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, x):
        return x + self.net(x)

    def training_step(self, batch, batch_idx):
        noisy, clean = batch
        return F.l1_loss(self(noisy), clean)

    def validation_step(self, batch, batch_idx):
        noisy, clean = batch
        self.log("val_mse", F.mse_loss(self(noisy), clean))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def mask_loaders(batch_size: int = 200) -> tuple[Any, Any]:
    """What is bright, but for noise and the first row, which no-one labelled."""
    images, _ = digits()
    mask = (images[:, 0] > 0.4).long()
    mask[:, 0] = IGNORED
    noisy = (images + 0.05 * torch.randn(images.shape, generator=generator())).clamp(0, 1)
    return loaders(noisy, mask, batch_size=batch_size)


def noisy_loaders() -> tuple[Any, Any]:
    images, _ = digits()
    return loaders((images + 0.1 * torch.randn(images.shape, generator=generator())).clamp(0, 1), images)


def pixel_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), batch[1], ignore_index=IGNORED, reduction="none").flatten(1).sum(1)


PIPELINES = [
    Pipeline(
        "segmentation_ignore",
        "segmentation",
        Segmenter,
        mask_loaders,
        pixel_loss,
        lambda module, batch, x: mean_iou(module.net(x), batch[1]).item(),
        metric="val_miou",
        epochs=15,
    ),
    regressor("image_to_image", Denoiser, noisy_loaders, task="restoration"),
]

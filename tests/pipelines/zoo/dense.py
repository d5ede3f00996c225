"""A label, or a value, for each pixel."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import generator, loaders
from pipelines.pipeline import Pipeline, regressor
from support.lightning_modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel

IGNORED = 255


class Segmenter(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 2, 5, padding=2))
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


def mask_loaders() -> tuple[Any, Any]:
    """A bright square with a faint texture on a noisy ground; no-one labelled the first rows."""
    draw = generator()
    rows, columns = torch.arange(16)[:, None], torch.arange(16)
    corner, side = torch.randint(0, 9, (2, 400, 1, 1), generator=draw), torch.randint(5, 9, (400, 1, 1), generator=draw)
    down, right = rows - corner[0], columns - corner[1]
    mask = ((down >= 0) & (down < side) & (right >= 0) & (right < side)).long()
    texture = 0.12 * (1 - 2 * ((rows + columns) % 2))
    images = 0.3 + 0.35 * mask + texture * mask + 0.15 * torch.randn(mask.shape, generator=draw)
    mask[:, :2] = IGNORED
    train, val = (TensorDataset(images[i:j, None].clamp(0, 1), mask[i:j]) for i, j in ((0, 300), (300, 400)))
    return DataLoader(train, 50, shuffle=True), DataLoader(val, 100)


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
        threat=ThreatModel(eps=0.12),
        epochs=15,
        gain=0.02,  # 0.03 to 0.08 over five seeds of the attack's noise
    ),
    regressor("image_to_image", Denoiser, noisy_loaders, task="restoration", epochs=20, gain=0.07),
]

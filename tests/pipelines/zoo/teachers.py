"""Modules that learn from another model, or from what is not labelled."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from pipelines.data import digit_loaders
from pipelines.pipeline import Pipeline, classifier
from pipelines.zoo.classification import Plain, mlp
from pipelines.zoo.similarity import view_loaders
from support.lightning_modules import digits, trained_classifier
from torch import Tensor
from torch.utils.data import DataLoader


class Distillation(Plain):
    """A frozen teacher's outputs are the targets."""

    def __init__(self):
        super().__init__()
        self.teacher = trained_classifier().requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            soft = (self.teacher(x) / 2).softmax(1)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits / 2, soft)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 5e-3)


class MeanTeacher(Plain):
    """An average of the weights over time, kept by a hook, is what is evaluated."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        with torch.no_grad():
            target = self.average(x).softmax(1)
        return F.cross_entropy(logits, y) + 0.5 * F.mse_loss(logits.softmax(1), target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.2)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.average(x).argmax(1) == y).float().mean())


class BYOL(L.LightningModule):
    """Moves its target network in the step itself, and counts its steps in a buffer."""

    def __init__(self):
        super().__init__()
        self.online, self.predictor = mlp(16), mlp(16, inputs=16)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(0))

    def apart(self, first, second):
        with torch.no_grad():
            target = F.normalize(self.target(second), dim=1)
        return 2 - 2 * (F.normalize(self.predictor(self.online(first)), dim=1) * target).sum(1).mean()

    def training_step(self, batch, batch_idx):
        first, second, _ = batch
        with torch.no_grad():
            self.steps += 1
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        return self.apart(first, second)

    def validation_step(self, batch, batch_idx):
        first, second, _ = batch
        self.log("val_apart", self.apart(first, second))

    def configure_optimizers(self):
        return torch.optim.Adam([*self.online.parameters(), *self.predictor.parameters()], 2e-3)


class FixMatch(Plain):
    """Labelled images, and unlabelled ones in a weak and a strong view."""

    def training_step(self, batch, batch_idx):
        x, y = batch["labelled"]
        weak, strong = batch["unlabelled"]
        with torch.no_grad():
            confidence, pseudo = self(weak).softmax(1).max(1)
        consistency = F.cross_entropy(self(strong), pseudo, reduction="none") * (confidence > 0.8)
        loss = F.cross_entropy(self(x), y) + consistency.mean()
        self.log("confident", (confidence > 0.8).float().mean())
        return loss


def fixmatch_loaders() -> tuple[Any, Any]:
    (labelled, val), images = digit_loaders(batch_size=60), digits()[0][800:1400]

    def views(rows: list) -> Any:
        x = torch.stack(rows)
        return x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1)

    unlabelled = DataLoader(images, 60, shuffle=True, collate_fn=views)
    return CombinedLoader({"labelled": labelled, "unlabelled": unlabelled}, "max_size_cycle"), val


def labelled_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), batch["labelled"][1], reduction="none")


def apart(module: Any, batch: Any, x: Tensor) -> Tensor:
    target = F.normalize(module.target(batch[1]), dim=1).detach()
    return 2 - 2 * F.cosine_similarity(module.predictor(module.online(x)), target)


PIPELINES = [
    classifier("distillation", Distillation, digit_loaders),
    classifier(
        "mean_teacher", MeanTeacher, digit_loaders, logits=lambda module, batch, x: module.average(x), gain=0.09
    ),
    Pipeline(
        "byol",
        "self-supervised",
        BYOL,
        lambda: view_loaders(nested=False),
        apart,
        lambda module, batch, x: apart(module, batch, x).mean().item(),
        metric="val_apart",
        better="lower",
        tolerance=0.15,
    ),
    classifier(
        "fixmatch",
        FixMatch,
        fixmatch_loaders,
        task="semi-supervised",
        train_loss=labelled_loss,
        train_inputs=lambda module, batch: batch["labelled"][0],
        arguments={"inputs": "labelled.0"},
        monitor_arguments={},
        gain=0.09,
    ),
]

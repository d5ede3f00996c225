"""A small pipeline on real data, as a user would have it: written for nothing of ours."""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Format = Literal["tuple", "list", "dict", "dataclass", "namedtuple"]

NamedBatch = namedtuple("NamedBatch", ["index", "image", "label"])


@dataclass
class DataclassBatch:
    image: Tensor
    label: Tensor


class DigitsClassifier(L.LightningModule):
    """Classifies digits; reads batches of every format of :func:`digits_loaders`.

    Args:
        batch_norm: with a BatchNorm after the convolution.
        calls: ``"self"`` to call ``self(x)`` in the steps; ``"net"`` to call ``self.net(x)``, with no ``forward`` at all in
            :class:`HeadlessDigitsClassifier`.
        learning_rate: of Adam.
    """

    def __init__(
        self, batch_norm: bool = False, calls: Literal["self", "net"] = "self", learning_rate: float = 3e-3
    ) -> None:
        super().__init__()
        self.calls, self.learning_rate = calls, learning_rate
        self.net = nn.Sequential()
        self.net.add_module("conv", nn.Conv2d(1, 8, 3, stride=2, padding=1))
        if batch_norm:
            self.net.add_module("norm", nn.BatchNorm2d(8))
        self.net.add_module("act", nn.ReLU())
        self.net.add_module("flatten", nn.Flatten())
        self.net.add_module("hidden", nn.Linear(8 * 4 * 4, 32))
        self.net.add_module("hidden_act", nn.ReLU())
        self.net.add_module("head", nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = unpack(batch)
        return F.cross_entropy(self(inputs) if self.calls == "self" else self.net(inputs), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(unpack(batch)[0]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(unpack(batch)[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), self.learning_rate)


class HeadlessDigitsClassifier(DigitsClassifier):
    """Calls ``self.net(x)`` and has no ``forward``."""

    forward = L.LightningModule.forward

    def __init__(self, **options: Any) -> None:
        super().__init__(calls="net", **options)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images ``(N, 1, 8, 8)`` in [0, 1] and labels, shuffled."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def trained_classifier(batch_norm: bool = False) -> DigitsClassifier:
    """A fresh copy of a classifier that was trained, not robustly, on the training digits."""
    module = DigitsClassifier(batch_norm=batch_norm)
    module.load_state_dict(_trained_state(batch_norm))
    return module


@functools.cache
def _trained_state(batch_norm: bool) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = DigitsClassifier(batch_norm=batch_norm)
        loader, _ = digits_loaders(batch_size=64)
        optimizer = torch.optim.Adam(module.parameters(), 5e-3)
        for _ in range(10):
            for batch in loader:
                optimizer.zero_grad()
                module.loss(batch).backward()
                optimizer.step()
    return module.state_dict()


def digits_loaders(
    batch_size: int = 32, format: Format = "tuple", train_size: int = 512, val_size: int = 128, shuffle: bool = True
) -> tuple[DataLoader, DataLoader]:
    """Dataloaders for training and validation, whose batches have this format."""
    images, labels = digits()
    train = TensorDataset(images[:train_size], labels[:train_size])
    val = TensorDataset(images[train_size : train_size + val_size], labels[train_size : train_size + val_size])
    collate = functools.partial(_collate, format)
    return (
        DataLoader(train, batch_size, shuffle=shuffle, collate_fn=collate),
        DataLoader(val, batch_size, collate_fn=collate),
    )


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a batch of any of the formats."""
    if isinstance(batch, (DataclassBatch, NamedBatch)):
        return batch.image, batch.label
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    inputs, labels = batch
    return inputs, labels


def quiet_trainer(**kwargs: Any) -> L.Trainer:
    """A trainer on one CPU that logs, saves and prints nothing unless told to."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **kwargs})


def _collate(format: Format, samples: list[tuple[Tensor, Tensor]]) -> Any:
    images, labels = (torch.stack(part) for part in zip(*samples, strict=True))
    if format == "dict":
        return {"image": images, "label": labels}
    if format == "dataclass":
        return DataclassBatch(images, labels)
    if format == "namedtuple":
        return NamedBatch(torch.arange(len(images)), images, labels)
    return [images, labels] if format == "list" else (images, labels)

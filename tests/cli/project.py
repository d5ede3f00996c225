"""What a user's project has, for the tests of the command."""

from __future__ import annotations

import lightning as L
import torch
from support.lightning_modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitsData(L.LightningDataModule):
    """Test digits in batches, and others to train with."""

    def __init__(self, batch_size: int = 32, size: int = 128) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def setup(self, stage: str) -> None:
        images, labels = digits()
        self.data = TensorDataset(images[512 : 512 + self.size], labels[512 : 512 + self.size])

    def test_dataloader(self):
        return DataLoader(self.data, self.batch_size)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, shuffle=True)


class SeveralLoaders(DigitsData):
    def test_dataloader(self):
        return [DataLoader(self.data, self.batch_size), DataLoader(TensorDataset(*self.data[:8]), 8)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class NoLoader(DigitsData):
    def test_dataloader(self):
        return []


class FailingData(DigitsData):
    def setup(self, stage: str) -> None:
        raise KeyError("/data/digits")


class Probabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Named(Probabilities):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net[:2](x)}


class Wide(nn.Module):
    """Has an argument without a default."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(64, width)


def network() -> nn.Sequential:
    """The network of DigitsClassifier without the LightningModule."""
    from support.lightning_modules import DigitsClassifier

    return DigitsClassifier(batch_norm=True).net


class FailsAtLast(nn.Module):
    """Fails at batches of 3, of which there is one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3 and torch.is_grad_enabled():
            raise ArithmeticError("three")
        return self.net(x)


def untold(batch_norm: bool = False):
    """A function without the type of what it returns."""
    return Probabilities()

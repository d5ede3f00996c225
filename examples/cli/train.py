"""Everything from YAML: LightningCLI builds threat, recipe, attacks, callbacks and logger from `config.yaml`, and trains on scikit-learn's digits.

python examples/cli/train.py fit --config examples/cli/config.yaml
python examples/cli/train.py fit --config examples/cli/config.yaml --trainer.max_epochs 1
python examples/cli/train.py fit --config examples/cli/config.yaml --print_config > mine.yaml

Another callback from the shell, with its arguments:

python examples/cli/train.py fit --config examples/cli/config.yaml \
    --trainer.callbacks+=lightning_wdefense.DetectionMonitor \
    --trainer.callbacks.threat.eps=0.2 --trainer.callbacks.detectors='[energy, knn]'

Measured afterwards, with `robustness.yaml`:

lightning-wdefense evaluate --config examples/cli/robustness.yaml --checkpoint logs/lightning_logs/version_0/checkpoints/*.ckpt
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense.cli import SuggestingParser


class Digits(L.LightningModule):
    """A small CNN. Nothing in it knows of the callbacks."""

    def __init__(self, width: int = 16, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * width, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class DigitsData(L.LightningDataModule):
    """1,797 grey images of 8 x 8 pixels, from 0 to 1: 1,100 to train, 200 to validate, 497 to test."""

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.batch_size = batch_size
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
        labels = torch.tensor(data.target)[order]
        self.parts = [
            TensorDataset(images[part], labels[part]) for part in (slice(1100), slice(1100, 1300), slice(1300, None))
        ]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 200)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 500)


if __name__ == "__main__":
    # parser_class= makes the errors of misspelt keys name the nearest ones. LightningCLI without it works as well.
    cli = LightningCLI(Digits, DigitsData, parser_class=SuggestingParser)
    if cli.subcommand == "fit":
        best = cli.trainer.checkpoint_callback
        print(f"Most robust epoch: {best.best_model_path}, val/robust_acc {float(best.best_model_score):.1%}")

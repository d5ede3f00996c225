"""Callbacks composed by Hydra: a file each in `configs/callbacks/`, built by `_target_`, trained on scikit-learn's digits.

python examples/hydra/train.py
python examples/hydra/train.py trainer.max_epochs=1 callbacks.wasserstein_defense.recipe=trades
python examples/hydra/train.py threat.eps=0.1 '~callbacks.adversarial_example_logger'
python examples/hydra/train.py threat=l2
python examples/hydra/train.py callbacks=none                    # undefended and not measured
python examples/hydra/train.py --cfg job --resolve               # shows what is built, and trains nothing
python examples/hydra/train.py -m callbacks.wasserstein_defense.recipe=pgd-at,trades,class-transport
"""

from __future__ import annotations

import hydra
import lightning as L
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    """A small CNN. Nothing in it knows of the callbacks."""

    def __init__(self, width: int, lr: float):
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

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class DigitsData(L.LightningDataModule):
    """Grey images of 8 x 8 pixels, from 0 to 1: 1,300 to train, 497 to validate."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        data = load_digits()
        images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
        self.train, self.val = TensorDataset(images[:1300], labels[:1300]), TensorDataset(images[1300:], labels[1300:])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 500)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    L.seed_everything(config.seed)
    callbacks = [instantiate(each) for each in config.callbacks.values()] if config.callbacks else []
    trainer = instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(instantiate(config.model), instantiate(config.data))
    print(
        "At the end: "
        + ", ".join(
            f"{key} {float(value):.3f}" for key, value in sorted(trainer.callback_metrics.items()) if "val" in key
        )
    )


if __name__ == "__main__":
    main()

"""Everything that arrives at Weights & Biases: metrics, a robustness curve, and pictures of adversarial examples.

python examples/wandb_logging.py            # offline: `wandb sync` uploads the run later
python examples/wandb_logging.py --online   # after `wandb login`
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import AdversarialExampleLogger, RobustnessMonitor, ThreatModel, WassersteinDefense

THREAT = ThreatModel(norm="linf", eps=0.2)


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--online", action="store_true", help="upload while training")
    offline = not parser.parse_args().online
    L.seed_everything(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    train = DataLoader(TensorDataset(images[:1300], labels[:1300]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(images[1300:], labels[1300:]), batch_size=256)
    callbacks = [
        WassersteinDefense("pgd-at", threat=THREAT, warmup_epochs=2),
        RobustnessMonitor(THREAT, ["fgsm", "pgd"], epsilons=[0.05, 0.1, 0.2]),
        AdversarialExampleLogger(THREAT, samples=4),
        # Adversarial training overfits: keep the epoch that is most robust, not the last one.
        ModelCheckpoint(monitor="val/robust_acc", mode="max"),
    ]
    logger = WandbLogger(project="lightning-wdefense", offline=offline)
    trainer = L.Trainer(max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=5)
    trainer.fit(Digits(), train, val)
    print(f"Most robust epoch: {trainer.checkpoint_callback.best_model_path}")


if __name__ == "__main__":
    main()

"""The defence inside a module of your own, under manual optimisation: ``self.defend`` makes the call.

python examples/mixin.py
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefenseMixin

THREAT = ThreatModel(norm="l2", eps=1.0)


class RobustDigits(WassersteinDefenseMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def configure_defense(self):
        return Recipe.named("trades", THREAT, weight=3.0, warmup_epochs=1.0)

    def training_step(self, batch, batch_idx):
        output = self.defend(*batch)
        self.log_dict({f"defense/{key}": value for key, value in output.logs.items()})
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(output.loss)
        optimizer.step()

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main():
    L.seed_everything(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    train = DataLoader(TensorDataset(images[:1300], labels[:1300]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[1300:], labels[1300:]), batch_size=256)
    monitor = RobustnessMonitor(THREAT, ["pgd"])
    trainer = L.Trainer(max_epochs=5, callbacks=[monitor], logger=False, enable_checkpointing=False)
    module = RobustDigits()
    trainer.fit(module, train)
    trainer.test(module, test)


if __name__ == "__main__":
    main()

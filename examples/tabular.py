"""Not for images alone: breast cancer, thirty measurements a patient, standardised, without bounds, two classes.

python examples/tabular.py
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import RobustnessMonitor, ThreatModel, WassersteinDefense

# eps in standard deviations of each measurement; there is no smallest or largest value that all of them share.
THREAT = ThreatModel(norm="linf", eps=0.5, bounds=None)


class Diagnosis(L.LightningModule):
    """A binary classifier with a single logit and batches that are dicts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch["x"]), batch["y"])

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-4)


class Patients(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("x", "y"), super().__getitem__(index), strict=True))


def main():
    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data)[order].float()
    labels = torch.tensor(data.target)[order].float()
    scaler = StandardScaler().fit(inputs[:400])
    inputs = torch.tensor(scaler.transform(inputs)).float()
    train = DataLoader(Patients(inputs[:400], labels[:400]), batch_size=50, shuffle=True)
    test = DataLoader(Patients(inputs[400:], labels[400:]), batch_size=200)
    for name, defense in {"undefended": [], "defended": [WassersteinDefense(threat=THREAT)]}.items():
        L.seed_everything(0, verbose=False)
        module = Diagnosis()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        L.Trainer(max_epochs=20, callbacks=defense, **quiet).fit(module, train)
        monitor = RobustnessMonitor(THREAT, ["pgd"])
        numbers = L.Trainer(callbacks=[monitor], **quiet).test(module, test, verbose=False)[0]
        print(f"{name}: clean {numbers['test/clean_acc']:.1%}, under PGD {numbers['test/robust_acc']:.1%}")


if __name__ == "__main__":
    main()

"""Put a purifier in front of a classifier, and see what a naive evaluation of it would have told you.

    pip install -e ".[examples]" && python examples/purifier.py

Handwritten digits from scikit-learn, a small classifier that nobody defended, an attacker who may change every pixel by 0.2 of its range. Two
purifiers are trained: one as the papers did, on attacks of the classifier alone, and one on attacks that go through it. Of each the table
shows what is left when the attack sees the classifier alone (naive), and when it goes through the purifier, which is what an attacker would
do. ``--fast`` runs every step on less, for a quick look.
"""

from __future__ import annotations

import argparse
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD, AutoAttack, worst_case
from lightning_wdefense.defenses import ResidualGenerator, WassersteinPurifier

warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")
warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")

THREAT = ThreatModel(norm="linf", eps=0.2)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class DigitClassifier(L.LightningModule):
    """An ordinary module: nothing in it knows of attacks or purifiers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def digits(fast):
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: 25 if fast else 150], order[500:]
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
    return loader, images[test], labels[test]


def purifier_for(classifier, loader, epochs, *, through):
    purifier = WassersteinPurifier(
        classifier, THREAT, PGD(THREAT, steps=5), generator=ResidualGenerator(64, width=256), through=through, lr=3e-3
    )
    L.Trainer(max_epochs=epochs, **QUIET).fit(purifier, loader)
    return purifier.purified.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    return float((model(images).argmax(1) == labels).float().mean())


def left_after(attack, model, images, labels):
    """What an attack on the whole model leaves right."""
    return float(worst_case(model, {"attack": attack}, images, labels).robust.float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fast", action="store_true", help="a few test images, few epochs, and fewer queries in AutoAttack"
    )
    fast = parser.parse_args().fast
    L.seed_everything(0, verbose=False)
    loader, images, labels = digits(fast)
    classifier = DigitClassifier()
    L.Trainer(max_epochs=5 if fast else 15, **QUIET).fit(classifier, loader)
    models = {"no purifier": classifier.eval()}
    for name, through in (("trained as usual", False), ("trained through", True)):
        print(f"A purifier {name}...")
        models[name] = purifier_for(classifier, loader, 3 if fast else 15, through=through)
    pgd = PGD(THREAT, steps=20)
    autoattack = AutoAttack(THREAT, steps=10, queries=50) if fast else AutoAttack(THREAT)
    seen = pgd(classifier, images, labels)  # all that a naive evaluation attacks with
    view = Table(title=f"scikit-learn digits, {THREAT.norm} eps = {THREAT.eps}: accuracy")
    for column in ("", "clean", "naive PGD", "PGD through", "AutoAttack through"):
        view.add_column(column, justify="left" if not column else "right")
    for name, model in models.items():
        print(f"Attacking: {name}...")
        shares = [accuracy(model, images, labels), accuracy(model, seen, labels)]
        shares += [left_after(attack, model, images, labels) for attack in (pgd, autoattack)]
        view.add_row(name, *[f"{share:.1%}" for share in shares])
    Console().print(view)


if __name__ == "__main__":
    main()

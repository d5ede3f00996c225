"""Train the same model with and without adversarial training, and write a report of each and a comparison of both.

    pip install -e ".[examples]" && python examples/report.py

Handwritten digits from scikit-learn, a small CNN, an attacker who may change every pixel by 0.2 of its range. Writes a folder ``reports``:
``undefended/report.html``, ``pgd-at/report.html`` and ``comparison.html``, each with the same as Markdown and as JSON beside it. ``--fast``
runs every step on less, for a quick look.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel, WassersteinDefense, audit, evaluate
from lightning_wdefense.attacks import FMN
from lightning_wdefense.audit import Report, compare

warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")

THREAT = ThreatModel(norm="linf", eps=0.2)
SEED = 0


class DigitClassifier(L.LightningModule):
    """An ordinary module: nothing in it knows of attacks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def digits(fast):
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    train, test = order[500:], order[: 50 if fast else 500]
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=250),
    )


def report(name, callbacks, fast):
    L.seed_everything(SEED, verbose=False)
    train, test = digits(fast)
    module, epochs = DigitClassifier(), 1 if fast else 20
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(module, train)
    seconds = time.perf_counter() - start
    attacks, distances = ["pgd"] if fast else ["autoattack"], FMN(THREAT, steps=20 if fast else 100)
    result = evaluate(module, test, THREAT, attacks, distances=distances, examples=4, seed=SEED)
    checked = audit(module, test, THREAT, samples=20 if fast else 100, seed=SEED)
    print(f"{name}\n{result}\n\n{checked}\n")
    settings = {
        "seed": SEED,
        "data": "500 images of scikit-learn's digits",
        "epochs": epochs,
        "callbacks": [type(each).__name__ for each in callbacks],
    }
    return Report(name, result, checked, cost={"training (s)": seconds}, settings=settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="less of everything, for a quick look")
    fast = parser.parse_args().fast
    folder = Path("reports")
    reports = [
        report("undefended", [], fast),
        report("pgd-at", [WassersteinDefense("pgd-at", threat=THREAT)], fast),
    ]
    for each in reports:
        each.write(folder / each.name)
    comparison = compare(reports)
    (difference,) = comparison.differences
    print(
        f"pgd-at keeps {-100 * difference.robust.difference:.1f} points more under attack (95% interval {-100 * difference.robust.high:.1f} to "
        f"{-100 * difference.robust.low:.1f}), on the same images."
    )
    page = comparison.write(folder)[0]
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()

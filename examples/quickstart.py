"""Train the same LightningModule as it is and with one callback more, and see how robust each of the two became.

    pip install -e ".[examples]" && python examples/quickstart.py

Handwritten digits from scikit-learn, a small CNN, an attacker who may change every pixel by 0.2 of its range. Prints a table and
writes robustness.png into the current folder. ``--fast`` runs every step on less, for a quick look.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")

THREAT = ThreatModel(norm="linf", eps=0.2)
EPSILONS = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]


class DigitClassifier(L.LightningModule):
    """An ordinary module: nothing in it knows of attacks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits(fast):
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    train, test = torch.utils.data.random_split(dataset, [1297, 500], torch.Generator().manual_seed(0))
    if fast:
        test = torch.utils.data.Subset(test, range(50))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=250)


def run(callbacks, epochs, loaders):
    """Train and test a fresh module; the callbacks are all that differs."""
    L.seed_everything(0, verbose=False)
    train, test = loaders
    module = DigitClassifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **quiet)
    start = time.perf_counter()
    trainer.fit(module, train)
    seconds = time.perf_counter() - start
    curve = RobustnessMonitor(THREAT, [PGD(THREAT, steps=20)], epsilons=EPSILONS, name="curve")
    attacks = RobustnessMonitor(THREAT, ["pgd", "autoattack"], independent=True)
    print("Attacking the test set: PGD, AutoAttack, and PGD at several radii...")
    numbers = L.Trainer(callbacks=[attacks, curve], **quiet).test(module, test, verbose=False)[0]
    return module, seconds, numbers, curve


def table(results):
    view = Table(title=f"scikit-learn digits, {THREAT.norm} eps = {THREAT.eps}, {torch.get_num_threads()} CPU threads")
    for column in ("", "clean", "PGD", "AutoAttack", "AUAC", "training time"):
        view.add_column(column, justify="left" if not column else "right")
    for name, (_, seconds, numbers, _) in results.items():
        shares = [
            numbers[f"test/{key}"] for key in ("clean_acc", "robust_acc_pgd", "robust_acc_autoattack", "curve/auac")
        ]
        view.add_row(name, *[f"{share:.1%}" for share in shares], f"{seconds:.0f} s")
    Console().print(view)


def picture(results, images, labels, path):
    """Accuracy against eps for both models; below, digits as they are and as attacked, with each model's verdict."""
    figure = plt.figure(figsize=(9, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    axes = above.subplots()
    for name, (_, _, _, curve) in results.items():
        curve.curves["test/curve/robustness_curve"].plot(ax=axes, label=name)
    axes.axvline(THREAT.eps, color="grey", linestyle=":", label="trained eps")
    axes.set(title="Accuracy under PGD", xlabel="eps (share of the pixel range)")
    axes.legend()
    rows = {"clean": images}
    for name, (module, *_) in results.items():
        rows[f"attacked, to fool\nthe {name}"] = PGD(THREAT, steps=20)(module.eval(), images, labels)
    grid = below.subplots(len(rows), len(images))
    for row, (title, shown) in zip(grid, rows.items(), strict=True):
        for axes, image, label in zip(row, shown, labels, strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            for place, (module, *_) in zip((0.25, 0.75), results.values(), strict=True):
                verdict = module(image[None]).argmax()
                color = "green" if verdict == label else "red"
                axes.text(place, -0.05, int(verdict), color=color, transform=axes.transAxes, ha="center", va="top")
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    below.suptitle(f"Below each digit, what the {' (left) and the '.join(results)} (right) model takes it for")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a tenth of the test set and a few epochs")
    fast = parser.parse_args().fast
    loaders, epochs = digits(fast), 4 if fast else 15
    results = {
        "undefended": run([], epochs, loaders),
        "defended": run([WassersteinDefense(threat=THREAT)], epochs, loaders),
    }
    table(results)
    images, labels = next(iter(loaders[1]))
    with torch.no_grad():
        picture(results, images[:8], labels[:8], path := Path("robustness.png"))
    print(f"Wrote {path.resolve()}")


if __name__ == "__main__":
    main()

"""Trains on two processes, and goes on with what one process or two have trained; run by test_world_sizes.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from support.processes import group_ends

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

THREAT = ThreatModel(eps=0.1)
SAMPLES, SIZE = 256, 32
WARMUP = 1.6


class Watching(L.Callback):
    """Keeps what a training starts with, and the eps of each batch."""

    def __init__(self, defense: WassersteinDefense, monitor: RobustnessMonitor) -> None:
        self.defense, self.monitor, self.eps = defense, monitor, []

    def state(self, module: L.LightningModule) -> dict[str, Any]:
        last = self.monitor.state_dict()["last"].get("val", {})
        return {
            "weights": plain(dict(module.state_dict())),
            "learned": plain(self.defense.state_dict()),
            "epoch": self.monitor.state_dict()["epoch"],
            # Not the module's own loss, which it does not reduce over the ranks.
            "monitored": {key: value for key, value in last.items() if key.startswith("val/")},
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = self.state(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.eps.append(float(trainer.callback_metrics["defense/eps"]))


def train(case: str, ranks: int, epochs: int, loaded: Path | None, saved: Path) -> dict[str, Any]:
    """What a training started with and what it left, which is also in a checkpoint."""
    L.seed_everything(0 if loaded is None else 9, verbose=False)
    name, _, more = case.partition("+")
    recipe = Recipe.named(name, THREAT, awp=0.01 if more else 0.0, warmup_epochs=WARMUP)
    defense = WassersteinDefense(recipe)
    monitor = RobustnessMonitor(THREAT, {"pgd": PGD(THREAT, steps=2)}, progress=False)
    watching = Watching(defense, monitor)
    trainer = quiet_trainer(
        max_epochs=epochs,
        strategy="ddp" if ranks > 1 else "auto",
        devices=ranks,
        callbacks=[watching, defense, monitor],
        num_sanity_val_steps=0,
    )
    module = DigitsClassifier()
    trainer.fit(module, *digits_loaders(SIZE, train_size=SAMPLES, shuffle=False), ckpt_path=loaded)
    trainer.save_checkpoint(saved)
    return {"start": watching.start, "end": watching.state(module), "eps": watching.eps}


def main(folder: Path, alone: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for case in cases:
        found[case] = {
            "together": train(case, 2, 1, None, folder / f"{case}.ckpt"),
            "on together": train(case, 2, 2, folder / f"{case}.ckpt", folder / "unused.ckpt"),
            "on from one": train(case, 2, 2, alone / f"{case}.ckpt", folder / "unused.ckpt"),
        }
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    with group_ends():
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

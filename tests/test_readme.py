"""What README says is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from lightning import LightningDataModule
from support.lightning_modules import DigitsClassifier
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command():
    _, tests = (block.strip() for block in blocks("bash"))
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_first_example_runs(tmp_path, monkeypatch):
    class Pictures(LightningDataModule):
        def train_dataloader(self):
            pictures = names["threat"].to_model(torch.rand(4, 3, 8, 8))
            return DataLoader(TensorDataset(pictures, torch.arange(4)), batch_size=4)

        val_dataloader = train_dataloader

    class Module(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.net.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)

    monkeypatch.chdir(tmp_path)
    names = {"my_module": Module(), "my_datamodule": Pictures()}
    exec(blocks("python")[0], names)
    metrics = names["trainer"].callback_metrics
    assert 0 <= metrics["val/robust_acc"] <= metrics["val/clean_acc"] <= 1


def test_every_recipe_is_in_the_tables():
    from lightning_wdefense.defenses import RECIPES

    guide = (ROOT / "docs" / "recipes.md").read_text()
    for recipe in RECIPES:
        assert f"`{recipe}`" in README
        assert f"| `{recipe}` |" in guide

"""What README says is what happens."""

from __future__ import annotations

import ast
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
    code = blocks("python")[0]
    assert "max_epochs=30" in code
    exec(code.replace("max_epochs=30", "max_epochs=2"), names)
    metrics = names["trainer"].callback_metrics
    assert 0 <= metrics["val/robust_acc"] <= metrics["val/clean_acc"] <= 1


def test_every_recipe_is_in_the_table():
    from lightning_wdefense.defenses import RECIPES

    guide = (ROOT / "docs" / "recipes.md").read_text()
    for recipe in RECIPES:
        assert f"| `{recipe}` |" in guide


def extras() -> dict[str, set[str]]:
    """What each extra brings, with the extras that it names followed."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    written = {
        name: ast.literal_eval(wants) for name, wants in re.findall(r"^(\w+) = (\[.*?\])$", section, re.DOTALL | re.M)
    }

    def followed(name: str) -> set[str]:
        found = set()
        for want in written[name]:
            ours = re.fullmatch(r"lightning-wdefense\[(.+)\]", want)
            inner = [followed(each) for each in ours[1].split(",")] if ours else [{re.match(r"[\w-]+", want)[0]}]
            found |= set().union(*inner)
        return found

    return {name: followed(name) for name in written}


def test_torchattacks_and_its_old_pins_come_only_with_itself_and_the_tests():
    found = extras()
    assert {name for name, brings in found.items() if "torchattacks" in brings} == {
        "torchattacks", "test", "dev", "bench",
    }  # fmt: skip
    users = ("wandb", "plot", "cli", "detection", "geomloss")
    assert found["all"] == set().union(*(found[name] for name in users))


def test_every_extra_that_a_text_advises_brings_what_is_missing():
    brings, sources = extras(), [ROOT / "README.md"]
    for folder in ("lightning_wdefense", "examples", "docs"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    advised = {
        name
        for path in sources
        for names in re.findall(r"(?:lightning-wdefense|-e \"\.)\[([\w,]+)\]", path.read_text())
        for name in names.split(",")
    }
    assert {"all", "torchattacks", "plot", "detection", "geomloss"} <= advised <= brings.keys()
    missing = {
        "torchattacks": "torchattacks", "plot": "matplotlib", "detection": "scikit-learn", "wandb": "wandb", "geomloss": "geomloss",
    }  # fmt: skip
    assert all(package in brings[name] for name, package in missing.items())

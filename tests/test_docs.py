"""What docs/tasks.md says of a task is what the matrix of pipelines shows, and the code of all pages runs."""

from __future__ import annotations

import inspect
import pkgutil
import re
from typing import Any

import matplotlib
import pytest
import torch
import yaml
from lightning import LightningDataModule
from matplotlib import pyplot
from pipelines.runs import require
from pipelines.table import PIPELINES
from pipelines.test_defended import defended
from support.lightning_modules import DigitsClassifier
from support.modules import batch, classifier
from support.pages import PAGES, blocks, text
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel

matplotlib.use("Agg")

TASKS = text("docs/tasks.md")
BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}


def rows(columns: int) -> list[list[str]]:
    """The rows of the page's table with so many columns, without its head."""
    lines = [line for line in TASKS.splitlines() if line.startswith("|") and line.count("|") == columns + 1]
    _, rule, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rule) == {"---"}
    return found


def names(cell: str) -> list[str]:
    """The pipelines that a cell names."""
    return re.findall(r"`(\w+)`", cell)


ROWS, REFUSALS = rows(5), rows(3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_shown_by_its_pipelines(row):
    task, untouched, say, _, shown = row
    assert names(shown)
    assert untouched in ("yes", "no")
    for name in names(shown):
        pipeline = BY_NAME[name]
        assert pipeline.task == task.split(" (")[0]
        assert pipeline.refused is None
        if untouched == "yes":
            assert pipeline.arguments == {}
            assert pipeline.defended is None
        elif pipeline.defended is None:
            (argument,) = pipeline.arguments
            assert f"{argument}=" in say
            if argument == "inputs":
                written = re.search(r"`inputs=(.*?)`", say)[1]
                assert eval(written) == pipeline.arguments["inputs"]
        else:
            assert "mixin" in say


def test_every_task_of_the_matrix_has_a_row():
    assert {pipeline.task for pipeline in PIPELINES} == {row[0].split(" (")[0] for row in ROWS}


def test_no_pipeline_that_needs_a_word_is_hidden():
    shown = {name for row in ROWS if row[1] == "no" for name in names(row[-1])}
    assert shown == {
        pipeline.name
        for pipeline in PIPELINES
        if pipeline.refused is None and (pipeline.arguments or pipeline.defended)
    }


def test_every_refusal_of_the_matrix_has_a_row():
    shown = [name for row in REFUSALS for name in names(row[-1])]
    assert sorted(shown) == sorted(pipeline.name for pipeline in PIPELINES if pipeline.refused is not None)


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[-1].strip("`"))
def test_a_refusal_says_what_the_page_says(row):
    _, says, shown = row
    (name,), (said,) = names(shown), re.findall('"(.*)"', says)
    require(BY_NAME[name])
    with pytest.raises(Exception, match=re.escape(said)):
        defended(BY_NAME[name], "pgd-at")


class Pictures(LightningDataModule):
    """The reader's data: 4 images as the first example's pipeline normalises them."""

    def train_dataloader(self):
        pictures = FIRST_THREAT.to_model(torch.rand(4, 3, 8, 8))
        return DataLoader(TensorDataset(pictures, torch.arange(4)), batch_size=4)

    val_dataloader = train_dataloader


class ReadersModule(DigitsClassifier):
    """The reader's module, for images in colour."""

    def __init__(self):
        super().__init__()
        self.net.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)


FIRST_THREAT = ThreatModel(norm="linf", eps=8 / 255, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


def the_readers() -> dict[str, Any]:
    """What pages take for granted: a model with its data, and the module and the data of a Trainer."""
    images, labels = batch(1, 6, 6, n=12)
    model = classifier(1, 6, 6)
    return {
        "model": model,
        "images": images,
        "labels": labels,
        "loader": [(images[:8], labels[:8]), (images[8:], labels[8:])],
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "dataset": TensorDataset(images, labels),
        "my_module": ReadersModule(),
        "my_datamodule": Pictures(),
    }


SMALLER = {
    "docs/index.md": {"max_epochs=30": "max_epochs=2", '["autoattack"]': '["fgsm"]'},
    "docs/distributional.md": {"samples=1000": "samples=100"},
    "docs/attacks.md": {"steps=40": "steps=5", "WassersteinAttack(threat)(": "WassersteinAttack(threat, steps=5)("},
    "docs/audit.md": {"samples=100)\nprint": "samples=8)\nprint"},
    "docs/reports.md": {
        '["autoattack"]': '["fgsm"]',
        "audit(model, loader, threat)": "audit(model, loader, threat, samples=8)",
    },
    "docs/honest.md": {'"autoattack"': '"apgd-ce"'},
    "docs/concepts/measuring.md": {'"square"': '"fgsm"'},
    "docs/coming_from/art.md": {'"square"': '"fgsm"'},
    "docs/coming_from/robustbench.md": {"apgd-t": "fgsm"},
    "docs/distributed.md": {  # where there is one GPU, a Trainer refuses to have several
        "devices=2": 'devices=2, accelerator="cpu"',
        "devices=8": 'devices=8, accelerator="cpu"',
    },
}
"""Settings that a test has no time for, and what it takes in their place. Each must stand on the page."""


def check_distributional(names: dict[str, Any]) -> None:
    upper, lower = (names[name].compute().accuracies for name in ("metric", "lower"))
    assert upper.shape == lower.shape == (3,)
    assert names["sensitivity"].compute() > 0


def check_index(names: dict[str, Any]) -> None:
    metrics = names["trainer"].callback_metrics
    assert 0 <= metrics["val/robust_acc"] <= metrics["val/clean_acc"] <= 1
    assert {"val/robust_acc_pgd", "val/attack_success", "val/transport_shift"} <= metrics.keys()
    assert {"defense/task_loss", "defense/discrepancy", "defense/eps"} <= metrics.keys()


CHECKS = {"docs/distributional.md": check_distributional, "docs/index.md": check_index}
"""What must hold after the code of a page has run."""

WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page != "README.md"]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page go on from each other. README's are run by tests/test_readme.py."""
    monkeypatch.chdir(tmp_path)
    names, smaller = the_readers(), SMALLER.get(page, {})
    assert all(written in text(page) for written in smaller)
    for code in blocks(page, "python"):
        for written, taken in smaller.items():
            code = code.replace(written, taken)
        exec(compile(code, page, "exec"), names)
    CHECKS.get(page, lambda names: None)(names)
    pyplot.close("all")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "py")])
def test_code_that_is_not_run_is_python(page):
    for code in blocks(page, "py"):
        compile(code, page, "exec")


def classes(spec: Any) -> list[tuple[str, set[str]]]:
    """The classes and functions that a configuration names, with the arguments that it gives them."""
    if isinstance(spec, list):
        return [each for part in spec for each in classes(part)]
    if not isinstance(spec, dict):
        return []
    found = []
    if "class_path" in spec:
        found.append((spec["class_path"], set(spec.get("init_args", {}))))
    if "_target_" in spec:
        found.append((spec["_target_"], {key for key in spec if not key.startswith("_")}))
    return found + [each for part in spec.values() for each in classes(part)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_yaml_of_a_page_names_what_there_is(page):
    """tests/test_yaml.py builds what the page of configuration files shows."""
    for code in blocks(page, "yaml"):
        for path, arguments in classes(yaml.safe_load(code)):
            if path.startswith("lightning_wdefense."):
                it = pkgutil.resolve_name(path)
                known = inspect.signature(it).parameters
                takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
                assert takes_any or arguments <= known.keys(), path


@pytest.mark.parametrize("page", ["docs/measured.md", "docs/tasks.md"])
def test_the_matrix_is_counted(page):
    words = " ".join(text(page).split())
    there = [pipeline for pipeline in PIPELINES if pipeline.needs is None]
    refused = sum(pipeline.refused is not None for pipeline in there)
    said = sum(pipeline.refused is None and bool(pipeline.arguments or pipeline.defended) for pipeline in there)
    untouched = len(there) - refused - said
    counts = re.search(
        r"(\d+) (?:small pipelines of (\d+) tasks|work untouched).*? (\d+) after one argument.*? (\d+) are refused",
        words,
    )
    assert [int(counts[group]) for group in (1, 3, 4)] == [untouched, said, refused]
    assert counts[2] is None or int(counts[2]) == len({pipeline.task for pipeline in PIPELINES})

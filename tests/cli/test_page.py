"""docs/command.md shows options, commands and a YAML file that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from support.lightning_modules import trained_classifier

from lightning_wdefense.cli.options import parsers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command.md").read_text()
EXAMPLE = (ROOT / "examples" / "cli" / "robustness.yaml").read_text()


def test_every_option_that_is_named_exists():
    known = {
        option for parser in parsers()[1].values() for action in parser._actions for option in action.option_strings
    }
    named = set(re.findall(r"(--[a-z][\w.-]*[\w])", PAGE))
    own = {"--model.width", "--data.batch_size"}  # arguments of classes
    assert len(named) > 20
    assert named - own <= known
    assert {"evaluate", "audit", "compare"} == set(parsers()[1])


def test_the_yaml_file_is_the_example_which_is_built(command, monkeypatch):
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert EXAMPLE.endswith(shown)
    monkeypatch.chdir(ROOT)
    done = command("evaluate", "--config", "examples/cli/robustness.yaml", "--print_config")
    assert done.status == 0, done.err
    assert yaml.safe_load(done.out)["model"] == {"class_path": "examples.cli.train.Digits", "init_args": {"width": 16, "lr": 2e-3}}  # fmt: skip


def test_the_commands_are_those_of_the_example():
    lines = re.findall(r"^(?:python|lightning-wdefense) .*examples/cli.*$", PAGE, re.M)
    assert len(lines) == 2
    text = (ROOT / "examples" / "cli" / "train.py").read_text()
    assert all(line in text for line in lines)
    assert lines[1] in EXAMPLE


def test_a_model_that_is_exported_as_shown(command):
    names: dict = {}
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(shown, names)
    names["export"](trained_classifier(), torch.rand(4, 1, 8, 8), "model.pt2")
    with pytest.warns(UserWarning, match="outputs are used as features"):
        done = command(
            "evaluate", "--model=model.pt2", "--data=cli.project.DigitsData", "--attacks=fgsm", "--max-batches=1"
        )
    assert done.status == 0

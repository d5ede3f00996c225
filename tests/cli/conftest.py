"""Settings for the tests of the command: an empty working directory, checkpoints, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.lightning_modules import trained_classifier
from support.random_state import one_thread, seeded_tests

pytest.importorskip("jsonargparse")

__all__ = ["one_thread", "seeded_tests"]

MODEL, DATA = "support.lightning_modules.DigitsClassifier", "cli.project.DigitsData"


class Done(NamedTuple):
    """What the command did."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    """No report is written, which takes longer than all else; tests/cli/test_whole.py writes some."""
    from lightning_wdefense.audit import Report

    monkeypatch.setattr(Report, "write", lambda self, folder: [])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with ``digits.ckpt``, as Lightning writes it, and ``digits.pt``, a state_dict. The class needs ``batch_norm=True`` for both."""
    place = tmp_path_factory.mktemp("checkpoints")
    weights = trained_classifier(batch_norm=True).state_dict()
    hyperparameters = {"batch_norm": True, "learning_rate": 0.5, "not_an_argument": 3}
    content = {"state_dict": weights, "hyper_parameters": hyperparameters, "pytorch-lightning_version": "2.6.6"}
    torch.save({**content, "epoch": 3}, place / "digits.ckpt")
    torch.save(weights, place / "digits.pt")
    return place


@pytest.fixture
def command(capsys) -> Callable[..., Done]:
    """Runs the command in this process."""
    from lightning_wdefense.cli import main

    def run(*words: object) -> Done:
        status = main([str(word) for word in words])
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def evaluated(command, checkpoints) -> Callable[..., Done]:
    """Runs ``evaluate`` on the digits; words that are given come last, so that they win."""

    def run(*words: object) -> Done:
        model = ("--model", MODEL, "--checkpoint", checkpoints / "digits.ckpt")
        return command("evaluate", *model, "--data", DATA, "--threat.eps", 0.1, "--attacks", "fgsm", *words)

    return run

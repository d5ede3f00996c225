"""Two Trainers at once, in threads, end like one after the other."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from lightning.pytorch.trainer.connectors import data_connector
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from support.threads import one_core_each, restless

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

THREAT = ThreatModel(eps=0.2)


@pytest.fixture(autouse=True)
def _switch_often():
    with restless(1e-4):
        yield


@pytest.fixture(autouse=True)
def _loaders_in_turn(monkeypatch):
    """Lightning exchanges methods of the class DataLoader while it asks for one: two threads at once would fail in it."""
    exchanged, lock = data_connector._replace_dunder_methods, threading.RLock()

    @contextlib.contextmanager
    def in_turn(*args):
        with lock, exchanged(*args):
            yield

    monkeypatch.setattr(data_connector, "_replace_dunder_methods", in_turn)


def run(recipe, awp=0.0):
    """A training run, made here, to be started wherever one likes; it returns the weights and what was measured."""
    torch.manual_seed(0)
    module = DigitsClassifier(batch_norm=True)
    defense = WassersteinDefense(Recipe.named(recipe, THREAT, awp=awp, warmup_epochs=0))
    monitor = RobustnessMonitor(THREAT, attacks=[PGD(THREAT, steps=2)], features="penultimate", max_batches=1)
    options = {"limit_train_batches": 3, "limit_val_batches": 1, "log_every_n_steps": 2}
    trainer = quiet_trainer(callbacks=[defense, monitor], **options)
    loaders = digits_loaders(shuffle=False)

    def start():
        trainer.fit(module, *loaders)
        measured = {key: float(value) for key, value in trainer.callback_metrics.items()}
        return torch.cat([value.flatten() for value in module.state_dict().values()]), measured

    return start


@pytest.mark.parametrize("recipes", [("pgd-at", "trades"), ("class-transport", "sat-features")], ids="+".join)
def test_end_like_one_after_the_other(recipes):
    settings = [(recipe, awp) for recipe, awp in zip(recipes, (0.01, 0.0), strict=True)]
    alone = [run(*each)() for each in settings]
    runs = [run(*each) for each in settings]
    together = threading.Barrier(2)

    def start(each):
        together.wait(120)
        return each()

    with one_core_each(2) as pool:
        for (weights, measured), (expected, expected_measured) in zip(pool.map(start, runs), alone, strict=True):
            assert torch.equal(weights, expected)
            assert measured == expected_measured

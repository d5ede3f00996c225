"""The wrapper around training_step comes off without a trace, in any order."""

from __future__ import annotations

import itertools

import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden
from support.lightning_modules import DigitsClassifier

from lightning_wdefense.callbacks.interception import intercept_training_step


def adding(amount):
    def interceptor(step, *args, **kwargs):
        return [*step(*args, **kwargs), amount]

    return interceptor


class Module(DigitsClassifier):
    def training_step(self, batch, batch_idx):
        return [batch]


def test_interceptors_nest_the_last_one_outside():
    module = Module()
    for amount in (1, 2, 3):
        intercept_training_step(module, adding(amount))
    assert module.training_step(0, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_they_come_off_in_any_order(order):
    module = Module()
    undo = [intercept_training_step(module, adding(amount)) for amount in range(3)]
    left = [0, 1, 2]
    for index in order:
        undo[index]()
        left.remove(index)
        assert module.training_step("batch", 0) == ["batch", *left]
    assert "training_step" not in module.__dict__


def test_undoing_twice_is_harmless():
    module = Module()
    undo = intercept_training_step(module, adding(1))
    undo()
    undo()
    assert "training_step" not in module.__dict__


def test_somebody_elses_wrapper_above_ours_survives():
    module = Module()
    undo = intercept_training_step(module, adding(1))
    ours = module.training_step
    module.training_step = lambda *args: [*ours(*args), "theirs"]
    undo()
    assert module.training_step(0, 0) == [0, "theirs"]


def test_lightning_still_sees_the_users_step():
    module = Module()
    intercept_training_step(module, adding(1))
    assert is_overridden("training_step", module)
    assert module.training_step.__wrapped__.__code__ is Module.training_step.__code__

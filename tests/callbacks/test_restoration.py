"""What a defended step changes is undone, also where Lightning does not tell the callback that the run failed."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateFinder
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense


class Failing(DigitsClassifier):
    fails = True

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.fails:
            raise KeyError("mine")
        return super().training_step(batch, batch_idx)


class FailingLater(L.Callback):
    def on_exception(self, trainer, pl_module, exception):
        raise ValueError("while another error was handled")


def search():
    return LearningRateFinder(num_training_steps=3, early_stop_threshold=None)


def trainer(*callbacks, **options):
    defense = WassersteinDefense(Recipe.named("sat-features", ThreatModel(eps=0.1), awp=0.01, warmup_epochs=0))
    return quiet_trainer(callbacks=[*callbacks, defense], limit_train_batches=4, **options)


def hooks(module):
    return [hook for each in module.modules() for hook in (*each._forward_hooks, *each._forward_pre_hooks)]


@pytest.mark.parametrize("callback", [search, FailingLater])
def test_a_run_that_fails(callback, tmp_path):
    """In its search for a learning rate, where Lightning knows other callbacks; or with another callback that fails before."""
    module = Failing()
    with pytest.raises((KeyError, ValueError)):
        trainer(callback(), default_root_dir=tmp_path).fit(module, *digits_loaders())
    assert "training_step" not in module.__dict__
    assert not hooks(module)


def test_a_search_for_a_learning_rate_that_does_not_fail(tmp_path):
    module = Failing()
    module.fails = False
    run = trainer(search(), default_root_dir=tmp_path)
    before = set(run.callbacks)
    run.fit(module, *digits_loaders())
    assert set(run.callbacks) == before
    assert "training_step" not in module.__dict__

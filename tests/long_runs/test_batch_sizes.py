"""Batches whose size changes, from one to the next or from one run to the next."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.attacks import FGSM
from lightning_wdefense.defenses import RECIPES

THREAT = ThreatModel(eps=0.2)
CASES = [*(name for name in RECIPES if name != "standard"), "trades+awp", "critic+awp"]
EVERY_TERM = {"class-transport", "critic", "udr", "trades+awp"}
VARYING = [8, 24, 16, 3, 32, 2]


class Watched(DigitsClassifier):
    """Keeps the eps of each batch, and how many samples it had."""

    def __init__(self):
        super().__init__()
        self.eps, self.sizes = [], []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.eps.append(float(self.trainer.callback_metrics["defense/eps"]))
        self.sizes.append(len(batch[0]))


class Mixed(WassersteinDefenseMixin, Watched):
    """The same by the mixin."""

    def configure_defense(self):
        return Recipe(FGSM(THREAT), warmup_epochs=2)

    def training_step(self, batch, batch_idx):
        output = self.defend(*batch)
        self.log("defense/eps", output.logs["eps"])
        return output.loss


def defense(case="pgd-at", **options):
    name, _, more = case.partition("+")
    return WassersteinDefense(Recipe.named(name, THREAT, awp=0.01 if more else 0.0, **options))


def warm(*positions):
    """The eps at these places of a warm-up, in epochs, of two epochs."""
    return [THREAT.eps * min(1.0, position / 2) for position in positions]


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in EVERY_TERM else pytest.mark.slow) for name in CASES]
)
def test_every_recipe_takes_batches_of_any_size(case):
    images, labels = digits()
    ends = torch.tensor(VARYING).cumsum(0).tolist()
    batches = [list(range(end - size, end)) for end, size in zip(ends, VARYING, strict=True)]
    loader = DataLoader(TensorDataset(images[: ends[-1]], labels[: ends[-1]]), batch_sampler=batches)
    callback = defense(case, warmup_epochs=1)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback], log_every_n_steps=1)
    trainer.fit(module := Watched(), loader)
    assert module.sizes == VARYING * 2
    assert callback.state_dict()["batches"] == 2 * len(VARYING)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert module.eps == pytest.approx([min(1.0, (batch + 1) / 6) * THREAT.eps for batch in range(12)])


@pytest.mark.parametrize("how", ["callback", "mixin"])
@pytest.mark.parametrize(
    ("size", "rest"), [(16, [1 + batch / 8 for batch in range(1, 9)]), (64, [1.5, 2.0]), (32, [1.25, 1.5, 1.75, 2.0])]
)
def test_the_warmup_goes_on_where_it_stood(how, size, rest, tmp_path):
    """One epoch of four batches, then one of eight, of two or of four: the second half of a warm-up of two epochs."""

    def fit(size, epochs, ckpt_path=None):
        callbacks = [defense(warmup_epochs=2)] if how == "callback" else []
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}", save_top_k=-1)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks, saver], enable_checkpointing=True)
        module = Watched() if how == "callback" else Mixed()
        trainer.fit(module, digits_loaders(size, train_size=128)[0], ckpt_path=ckpt_path)
        return module.eps

    assert fit(32, 1) == pytest.approx(warm(0.25, 0.5, 0.75, 1.0))
    assert fit(size, 2, tmp_path / "1.ckpt") == pytest.approx(warm(*rest))
    # A third run, with batches as at first, knows what both were.
    assert fit(32, 3, tmp_path / "2.ckpt") == pytest.approx([THREAT.eps] * 4)


def test_a_search_for_the_batch_size(tmp_path):
    """Its trials count for nothing; the warm-up is of the batches that there are afterwards."""

    class Found(Watched):
        batch_size = 8

        def train_dataloader(self):
            return digits_loaders(self.batch_size, train_size=128)[0]

        def val_dataloader(self):
            return digits_loaders(self.batch_size, val_size=32)[1]

        def on_train_start(self):
            self.eps.clear()

    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8)
    callback = defense("critic", warmup_epochs=2)
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[finder, callback], default_root_dir=tmp_path, enable_checkpointing=True
    )
    trainer.fit(module := Found())
    batches = 128 // module.batch_size
    assert module.batch_size > 8
    assert module.eps == pytest.approx(warm(*((batch + 1) / batches for batch in range(batches))))
    assert callback.state_dict()["batches"] == batches

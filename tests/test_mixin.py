"""WassersteinDefenseMixin: the same loss as the callback, made by the module itself."""

from __future__ import annotations

import copy
import csv
import pickle
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import RECIPES

THREAT = ThreatModel(eps=0.2)


class Defended(WassersteinDefenseMixin, DigitsClassifier):
    def __init__(self, recipe="pgd-at", manual=False, **options):
        super().__init__(**options)
        self.recipe, self.automatic_optimization = recipe, not manual

    def configure_defense(self):
        return Recipe.named(self.recipe, THREAT, warmup_epochs=0.5)

    def training_step(self, batch, batch_idx):
        output = self.defend(*batch)
        self.log_dict({f"defense/{key}": value for key, value in output.logs.items()})
        if self.automatic_optimization:
            return output.loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(output.loss)
        optimizer.step()
        return None


def fit(make, *callbacks, **options):
    L.seed_everything(0, verbose=False)
    module = make()
    trainer = quiet_trainer(limit_train_batches=4, callbacks=list(callbacks), log_every_n_steps=2, **options)
    trainer.fit(module, digits_loaders(shuffle=False)[0])
    return trainer, getattr(module, "_orig_mod", module)


def weights(module):
    return torch.cat([parameter.detach().clone().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_as_the_callback_does(recipe, manual):
    callback = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0.5)
    _, expected = fit(DigitsClassifier, callback, precision="64-true")
    trainer, module = fit(lambda: Defended(recipe, manual), precision="64-true")
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)
    assert trainer.callback_metrics["defense/transport_cost"] >= -1e-4


def test_the_seed_decides_the_noise():
    class Seeded(Defended):
        def __init__(self, seed):
            super().__init__()
            self.seed = seed

        def training_step(self, batch, batch_idx):
            return self.defend(*batch, seed=self.seed).loss

    one, same, other = (weights(fit(lambda seed=seed: Seeded(seed))[1]) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    module, batch = Defended(), [part[:16] for part in digits()]  # and outside of a Trainer
    one, same, other = (module.defend(*batch, seed=seed).adversarial_inputs for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_measures_as_the_callback_does(tmp_path):
    """Which measures what it should: see the callback's own tests."""
    rows = []
    for name, make, callbacks in (
        ("callback", DigitsClassifier, [WassersteinDefense("sat", threat=THREAT, warmup_epochs=0.5)]),
        ("mixin", lambda: Defended("sat"), []),
    ):
        logger = CSVLogger(tmp_path, name)
        fit(make, *callbacks, logger=logger)
        logged = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        rows.append([{key: row[key] for key in row if key != "train/loss"} for row in csv.DictReader(logged)])
    assert [row["step"] for row in rows[0]] == ["1", "3"]
    assert float(rows[0][0]["defense/transport_cost"]) > 0
    assert rows[0] == rows[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_output_holds_what_the_recipe_needs(recipe):
    module = Defended(recipe)
    images, labels = (part[:16] for part in digits())
    output = module.defend(images, labels)
    needs = RECIPES[recipe](THREAT)
    assert output.loss.requires_grad
    assert (output.clean_outputs is None) == (not needs.needs("clean"))
    assert (output.adversarial_outputs is None) == (not needs.needs("adversarial"))
    moved = (output.adversarial_inputs - images).abs().max()
    assert moved <= 0.2 + 1e-6 or not needs.attack.bounded
    assert (moved > 0) == needs.active


def test_modes_and_gradients_are_left_alone():
    module = Defended("sat-features", batch_norm=True)
    module.net.norm.eval()
    module.defend(*(part[:16] for part in digits()))
    assert module.training
    assert not module.net.norm.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_runs_compiled():
    _, expected = fit(lambda: Defended("sat-features"))
    _, module = fit(lambda: torch.compile(Defended("sat-features"), backend="aot_eager"))
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-4, atol=1e-5)


def test_can_be_copied_pickled_and_saved():
    module = Defended("sat-features")
    batch = [part[:16] for part in digits()]
    loss = module.defend(*batch).loss
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin.defend(*batch).loss, loss)
    assert set(module.state_dict()) == set(DigitsClassifier().state_dict())
    assert [name for name, _ in module.named_children()] == ["net"]


def test_a_task_loss_of_its_own():
    class Smoothed(Defended):
        def task_loss(self, outputs, labels):
            return F.cross_entropy(outputs, labels, label_smoothing=0.5)

    images, labels = (part[:16] for part in digits())
    output = Smoothed("pgd-at").eval().defend(images, labels)
    expected = F.cross_entropy(output.adversarial_outputs, labels, label_smoothing=0.5)
    torch.testing.assert_close(output.loss, expected)


def test_a_missing_recipe_is_explained():
    class Forgetful(WassersteinDefenseMixin, DigitsClassifier):
        pass

    with pytest.raises(NotImplementedError, match="configure_defense"):
        Forgetful().defend(*(part[:4] for part in digits()))


@pytest.mark.parametrize("manual", [False, True])
def test_weight_perturbation_trains_as_with_the_callback(manual):
    class Perturbed(Defended):
        def configure_defense(self):
            return replace(super().configure_defense(), awp=0.01)

    callback = WassersteinDefense(Recipe.named("trades", THREAT, warmup_epochs=0.5, awp=0.01))
    _, expected = fit(DigitsClassifier, callback, precision="64-true")
    _, module = fit(lambda: Perturbed("trades", manual), precision="64-true")
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)


def test_perturbed_weights_come_back_after_an_error():
    class Broken(Defended):
        def configure_defense(self):
            return replace(super().configure_defense(), awp=0.01)

        def task_loss(self, outputs, labels):
            moved.append(not torch.equal(weights(self), start))
            if len(moved) == 2:
                raise RuntimeError("in the loss")
            return super().task_loss(outputs, labels)

    moved: list[bool] = []
    module = Broken()
    start = weights(module)
    with pytest.raises(RuntimeError, match="in the loss"):
        module.defend(*(part[:16] for part in digits()))
    assert moved == [False, True]
    assert torch.equal(weights(module), start)


@pytest.mark.parametrize("recipe", ["udr", "critic"])
def test_what_was_learned_is_in_the_checkpoint(recipe, tmp_path):
    trainer, module = fit(lambda: Defended(recipe))
    learned = plain(module.defense.state_dict())
    assert any(learned.values())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Defended(recipe)
    quiet_trainer(limit_train_batches=4, max_epochs=1).fit(again, digits_loaders()[0], ckpt_path=tmp_path / "last.ckpt")
    assert plain(again.defense.state_dict()) == learned


def test_nan_is_named():
    class Broken(Defended):
        def configure_defense(self):
            return Recipe(PGD(THREAT), discrepancy=lambda a, b, labels: a.sum() * torch.nan, weight=1.0)

    with pytest.raises(FloatingPointError, match="discrepancy = nan"):
        Broken().defend(*(part[:4] for part in digits()))

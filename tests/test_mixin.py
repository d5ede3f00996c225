"""WassersteinDefenseMixin: the same loss as the callback, made by the module itself."""

from __future__ import annotations

import contextlib
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
from lightning_wdefense._ranks import ALONE
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
    options = {"limit_train_batches": 4, "log_every_n_steps": 2, **options}
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, digits_loaders(shuffle=False)[0])
    return trainer, getattr(module, "_orig_mod", module)


def weights(module):
    return torch.cat([parameter.detach().clone().flatten() for parameter in module.parameters()])


# By hand the optimizer steps in the same way whatever the recipe: one of each kind.
@pytest.mark.parametrize(
    ("recipe", "manual"),
    [(recipe, False) for recipe in RECIPES] + [(recipe, True) for recipe in ("pgd-at", "trades", "udr", "critic")],
)
def test_trains_as_the_callback_does(recipe, manual):
    callback, options = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0.5), {"limit_train_batches": 3}
    _, expected = fit(DigitsClassifier, callback, precision="64-true", **options)
    trainer, module = fit(lambda: Defended(recipe, manual), precision="64-true", **options)
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
    options = {"limit_train_batches": 2}
    _, expected = fit(lambda: Defended("sat-features"), **options)
    _, module = fit(lambda: torch.compile(Defended("sat-features"), backend="eager"), **options)
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


class Perturbed(Defended):
    """Skips every backward pass, in one way or another, and takes note of where its weights are afterwards."""

    def __init__(self, way, **options):
        super().__init__("pgd-at", manual=way.startswith("manual"), **options)
        self.way, self.moved, self.losses = way, {}, []
        self.start = weights(self)

    def configure_defense(self):
        return replace(super().configure_defense(), awp=0.01, warmup_epochs=0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2**-10)

    def check(self, where):
        self.moved[where] = not torch.equal(weights(self), self.start)

    def training_step(self, batch, batch_idx):
        output = self.defend(*batch)
        self.check("in the step")
        self.losses.append(output.loss)  # alive: nothing comes back with it
        if self.way == "manual: step without backward":
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.optimizers().step()
            self.start = self.start - 2**-10
        if self.way == "manual: stop":
            raise StopIteration
        if self.way == "manual: caught":
            with contextlib.suppress(RuntimeError):
                self.manual_backward(output.loss + Failing.apply(output.loss))
        return None if self.way == "automatic: None" else output.loss

    def backward(self, loss):
        if self.way != "automatic: backward skipped":
            super().backward(loss)

    def on_train_batch_end(self, *args):
        self.check("after the batch")

    def validation_step(self, batch, batch_idx):
        self.check("in validation")
        self.defend(*batch)

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        saved = torch.cat([value.flatten() for value in checkpoint["state_dict"].values()])
        self.moved["in the checkpoint"] = not torch.equal(saved, self.start)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("in backward")


class Looking(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.check("for a callback")
        trainer.save_checkpoint(f"{trainer.default_root_dir}/last.ckpt")

    def on_exception(self, trainer, pl_module, exception):
        pl_module.check("for a callback, after an error")


@pytest.mark.parametrize(
    "way",
    [
        "manual: skipped",
        "manual: stop",
        "manual: caught",
        "manual: step without backward",
        "automatic: None",
        "automatic: backward skipped",
    ],
)
def test_perturbed_weights_come_back_without_a_backward_pass(way, tmp_path):
    module = Perturbed(way)
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = quiet_trainer(callbacks=[Looking()], **options)
    before = list(trainer.callbacks)
    trainer.fit(module, *digits_loaders(shuffle=False))
    module.check("after fit")
    assert module.moved.pop("in the step")
    assert len(module.moved) == 5
    assert not any(module.moved.values()), module.moved
    assert trainer.callbacks == before


def test_perturbed_weights_come_back_after_an_error_in_the_trainer():
    class Broken(Perturbed):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise KeyError("mine")

    module = Broken("manual: skipped")
    trainer = quiet_trainer(callbacks=[Looking()])
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(module, digits_loaders()[0])
    assert module.moved == {"in the step": True, "for a callback, after an error": False}
    assert len(trainer.callbacks) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_perturbed_weights_come_back_where_nothing_can_be_differentiated(mode):
    module = Perturbed("manual: skipped")
    with mode():
        module.defend(*(part[:16] for part in digits()))
    assert torch.equal(weights(module), module.start)


def test_perturbed_weights_come_back_on_demand():
    module = Perturbed("manual: skipped")
    module.defend(*(part[:16] for part in digits()))
    assert not torch.equal(weights(module), module.start)
    module.defense.restore_weights()
    assert torch.equal(weights(module), module.start)


@pytest.mark.parametrize("where", ["in the loss", "after the loss"])
def test_perturbed_weights_come_back_after_an_error(where):
    class Broken(Perturbed):
        def task_loss(self, outputs, labels):
            self.check(len(self.moved))
            if len(self.moved) == 2 and where == "in the loss":
                raise RuntimeError(where)
            return super().task_loss(outputs, labels)

    module = Broken("manual: skipped")
    images, labels = (part[:16] for part in digits())

    def body():
        if where == "in the loss":
            module.defend(images, labels)
        module.defense.recorder.attach(images)
        with module.defense.perturbed_weights(module.defense.passes(images, labels), images, ALONE) as until_backward:
            until_backward(module.task_loss(module(images), labels))
            raise RuntimeError(where)

    with pytest.raises(RuntimeError, match=where):
        body()
    assert True in module.moved.values()
    assert torch.equal(weights(module), module.start)


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

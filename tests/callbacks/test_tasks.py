"""Masks, outputs of several parts, models that diverged: through the Trainer, what is right is counted and what is not is said."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer, trained_classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import (
    AdversarialExampleLogger,
    DetectionMonitor,
    Recipe,
    RobustnessMonitor,
    ThreatModel,
    WassersteinDefense,
    WassersteinDefenseMixin,
)
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import RECIPES
from lightning_wdefense.defenses.discrepancies import weighted_kl
from lightning_wdefense.defenses.objective import mart_margin_loss

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)


class Segmenter(L.LightningModule):
    """Says of each pixel whether it is dark, half or bright."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def masks(void=255):
    images, _ = digits()
    classes = (images[:64, 0] * 2.99).long()
    return DataLoader(TensorDataset(images[:64], classes.masked_fill(classes.roll(1, 0) == 0, void)), 32)


def test_the_monitor_leaves_out_ignored_pixels():
    torch.manual_seed(0)
    module, loader = Segmenter(), masks()
    quiet_trainer(max_epochs=15).fit(module, loader)
    monitor = RobustnessMonitor(THREAT, {"pgd": PGD(THREAT, steps=3)}, ignore_index=255, epsilons=[0.05], features=None)
    (logged,) = quiet_trainer(callbacks=[monitor]).validate(module, loader, verbose=False)
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    kept = labels != 255
    clean = accuracy_score(labels[kept], module(inputs).argmax(1)[kept])
    assert logged["val/clean_acc"] == pytest.approx(clean)
    assert 0 < logged["val/robust_acc"] < clean
    assert logged["val/robust_acc"] < logged["val/auac"] < clean
    assert logged["val/attack_success"] == pytest.approx(1 - logged["val/robust_acc"] / clean)


@pytest.mark.parametrize("recipe", ["pgd-at", "trades", "mart", "alp", "fast-at"])
def test_masks_are_trained_on(recipe):
    """With -100 for pixels of no class, as torch's own loss has it, recipes need no word more."""

    class Standard(Segmenter):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    defense = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0)
    trainer = quiet_trainer(callbacks=[defense], max_epochs=1, log_every_n_steps=1)
    trainer.fit(module := Standard(), masks(void=-100))
    assert all(torch.isfinite(weight).all() for weight in module.parameters())
    assert 0 < trainer.callback_metrics["defense/clean_acc"] <= 1


def test_mart_on_masks_weighs_each_pixel():
    """Equal to MART's terms on the pixels as samples of their own, up to the number of pixels."""
    torch.manual_seed(0)
    clean, moved, labels = torch.randn(4, 3, 5, 6), torch.randn(4, 3, 5, 6), torch.randint(0, 3, (4, 5, 6))
    rows = lambda z: z.movedim(1, -1).reshape(-1, 3)  # noqa: E731
    expected = weighted_kl(rows(clean), rows(moved), labels.flatten())
    torch.testing.assert_close(weighted_kl(clean, moved, labels), expected * 30)
    torch.testing.assert_close(mart_margin_loss(moved, labels), mart_margin_loss(rows(moved), labels.flatten()))
    kept = torch.rand(4, 5, 6) > 0.3
    expected = weighted_kl(rows(clean)[kept.flatten()], rows(moved)[kept.flatten()], labels[kept])
    ignored = labels.masked_fill(~kept, -100)
    torch.testing.assert_close(weighted_kl(clean, moved, ignored), expected * kept.sum() / 4)
    torch.testing.assert_close(
        mart_margin_loss(moved, ignored), mart_margin_loss(rows(moved)[kept.flatten()], labels[kept])
    )


class TwoHeads(DigitsClassifier):
    """Returns a tuple, always or in train mode alone."""

    def __init__(self, always):
        super().__init__()
        self.always, self.aux = always, nn.Linear(64, 10)

    def forward(self, x):
        return (self.net(x), self.aux(x.flatten(1))) if self.always or self.training else self.net(x)

    def loss(self, batch):
        outputs, aux = self(batch[0])
        return F.cross_entropy(outputs, batch[1]) + 0.3 * F.cross_entropy(aux, batch[1])

    def validation_step(self, batch, batch_idx):
        pass


def first_head(outputs, labels):
    return F.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, labels, reduction="none")


@pytest.mark.parametrize("always", [False, True])
def test_outputs_of_several_parts_and_the_advice(always):
    """The part that the loss shows to be logits is found; a loss of the user's own reads all parts."""
    attack = PGD(THREAT, steps=2, loss=first_head)
    options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "log_every_n_steps": 1}
    recipe = Recipe.named("pgd-at", THREAT, attack=attack, warmup_epochs=0)
    for defense in (recipe, "pgd-at", "trades"):
        callback = WassersteinDefense(defense, threat=None if defense is recipe else THREAT)
        quiet_trainer(callbacks=[callback], **options).fit(TwoHeads(always), *digits_loaders())
    values = []
    for where in ({}, {"outputs": 0, "through": "model"}, {"model": "net", "through": "model"})[:: 1 if always else 2]:
        monitor = RobustnessMonitor(THREAT, ["pgd"], **where)
        torch.manual_seed(0)
        (logged,) = quiet_trainer(callbacks=[monitor]).validate(TwoHeads(always), digits_loaders()[1], verbose=False)
        values.append((logged["val/clean_acc"], logged["val/robust_acc"]))
    assert len(set(values)) == 1
    assert 0 < values[0][1] <= values[0][0]


@pytest.mark.parametrize("label", [0, 1])
def test_a_model_that_diverged_is_logged_as_lost(label):
    class Diverged(DigitsClassifier):
        def validation_step(self, batch, batch_idx):
            pass

    module = Diverged()
    nn.init.constant_(module.net.head.weight, torch.nan)
    images, _ = digits()
    loader = DataLoader(TensorDataset(images[:32], torch.full((32,), label)), 16)
    callbacks = [RobustnessMonitor(THREAT, epsilons=[0.05]), DetectionMonitor(THREAT, name="detection")]
    with pytest.warns(UserWarning, match="16 of 16 predictions, which count as wrong"):
        (logged,) = quiet_trainer(callbacks=callbacks).validate(module, loader, verbose=False)
    assert [logged[f"val/{key}"] for key in ("clean_acc", "robust_acc", "robust_acc_pgd", "auac")] == [0, 0, 0, 0]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "standard"])
def test_every_recipe_says_what_diverged(recipe):
    """The task's loss first, with its remedy; not that some ``x`` deep inside holds NaN."""

    class Diverged(DigitsClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                nn.init.constant_(self.net.head.weight, torch.nan)
                nn.init.constant_(self.net.hidden.weight, torch.nan)

    defense = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0)
    trainer = quiet_trainer(callbacks=[defense], max_epochs=1, log_every_n_steps=1)
    with pytest.raises(
        FloatingPointError, match=r"task_loss = nan.*task_loss is the training_step's own loss: lower the"
    ):
        trainer.fit(Diverged(), digits_loaders()[0])


@pytest.mark.parametrize("recipe", ["trades", "pgd-at", "sat"])
def test_an_illegal_label_under_the_mixin_is_named(recipe):
    class Defended(WassersteinDefenseMixin, DigitsClassifier):
        def configure_defense(self):
            return Recipe.named(recipe, THREAT)

    images = digits()[0]
    with pytest.raises(ValueError, match=r"labels run from 0 to 10, but the model has 10 classes"):
        Defended().defend(images[:11], torch.arange(11))


def test_regression_targets_are_no_classes_for_any_part_of_a_recipe():
    """With a loss of its own the attack takes them; transport within classes says that these are none."""

    class Regressor(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.net.head = nn.Linear(32, 1)

        def loss(self, batch):
            return F.mse_loss(self(batch[0]), batch[1])

    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:64], labels[:64, None] / 9), 32)
    attack = PGD(THREAT, steps=2, loss=lambda z, y: (z - y).square().mean(1))
    options = {"max_epochs": 1, "log_every_n_steps": 1}

    def fit(recipe):
        defense = WassersteinDefense(Recipe.named(recipe, THREAT, attack=attack, warmup_epochs=0))
        trainer = quiet_trainer(callbacks=[defense], **options)
        trainer.fit(Regressor(), loader)
        return trainer.callback_metrics

    for recipe in ("class-transport", "critic"):
        with pytest.raises(ValueError, match="class"):
            fit(recipe)
    for recipe in ("pgd-at", "sat-features", "alp-features"):
        logged = fit(recipe)
        assert "defense/clean_acc" not in logged
        assert logged["defense/transport_cost"] >= 0


def test_pictures_of_a_model_with_a_fixed_batch_size(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    class Fixed(DigitsClassifier):
        def forward(self, x):
            return self.net(x.view(32, 1, 8, 8))

    module = Fixed()
    module.load_state_dict(trained_classifier().state_dict())
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:64], labels[:64]), 32)
    callbacks = [
        AdversarialExampleLogger(THREAT, samples=4),
        RobustnessMonitor(THREAT, ["fgsm", "pgd"]),
        DetectionMonitor(THREAT, name="detection"),
    ]
    trainer = quiet_trainer(callbacks=callbacks, logger=TensorBoardLogger(tmp_path))
    (logged,) = trainer.validate(module, loader, verbose=False)
    (expected,) = quiet_trainer(callbacks=callbacks[1:]).validate(trained_classifier(), loader, verbose=False)
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value, abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("recipe", ["class-transport", "sat-label", "alp-features"])
def test_masks_without_ignored_pixels_are_one_class(recipe):
    defense = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[defense], log_every_n_steps=1)
    images, _ = digits()
    loader = DataLoader(TensorDataset(images[:64], (images[:64, 0] * 2.99).long()), 32)
    trainer.fit(Segmenter(), loader)
    assert trainer.callback_metrics["defense/discrepancy"] > 0

"""Models whose outputs for a sample depend on the others of its batch, or that take only whole batches, are never shown a part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.attacks import PGD, Execution

THREAT = ThreatModel(eps=0.1)
OPTIONS = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2}


SEEN: list[int] = []
"""The sizes of all batches that a model was shown."""


class Sizes(DigitsClassifier):
    def forward(self, x):
        SEEN.append(len(x))
        return self.net(self.prepared(x))

    def prepared(self, x):
        return x

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


class Centred(Sizes):
    """Centres the batch, in eval mode too."""

    def prepared(self, x):
        return x - x.mean(0)


class Fixed(Sizes):
    """Takes batches of 32 alone."""

    def prepared(self, x):
        return x.reshape(32, 1, 8, 8)


@pytest.mark.parametrize(("module", "reason"), [(Centred, "depend on the other samples"), (Fixed, "RuntimeError")])
@pytest.mark.filterwarnings("ignore:.*(warm-up|LeafSpec).*")
def test_after_the_first_look_no_part_is_run(module, reason):
    attack = PGD(THREAT, steps=4, early_exit=True, restarts=2)
    callbacks = [
        WassersteinDefense(Recipe(attack, warmup_epochs=0)),
        RobustnessMonitor(THREAT, ["fgsm", "pgd"], epsilons=[0.05]),
    ]
    SEEN.clear()
    with pytest.warns(UserWarning, match=f"not run on parts of a batch.*{reason}"):
        quiet_trainer(callbacks=callbacks, **OPTIONS).fit(module(), *digits_loaders())
    parts = [size for size in SEEN if size != 32]
    assert parts == [16] * len(parts)  # the looks' own
    assert len(parts) <= 2


def test_a_model_that_takes_parts_is_shown_parts():
    SEEN.clear()
    recipe = Recipe(PGD(THREAT, steps=4, early_exit=True), warmup_epochs=0)
    quiet_trainer(callbacks=[WassersteinDefense(recipe)], **OPTIONS).fit(Sizes(), digits_loaders()[0])
    assert len(set(SEEN)) > 2


def test_whole_batches_on_demand():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return torch.cat([x - 0.5, 0.5 - x], 1)

    attack = PGD(ThreatModel(eps=0.3), steps=6, early_exit=True)
    inputs, labels = torch.linspace(0.05, 0.95, 8).unsqueeze(1), torch.zeros(8, dtype=torch.long)
    found = attack(model, inputs, labels)
    assert min(sizes) < 8
    sizes.clear()
    whole = attack(model, inputs, labels, execution=Execution(whole=True))
    assert set(sizes) == {8}
    torch.testing.assert_close(whole, found)


class Masked(WassersteinDefenseMixin, DigitsClassifier):
    """Its forward takes a mask besides."""

    def forward(self, x, mask):
        return self.net(x * mask)

    def configure_defense(self):
        return Recipe.named(self.recipe, THREAT, warmup_epochs=0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        mask = torch.ones(8, 8)
        mask[:, 4:] = 0
        output = self.defend(x, y, forward=lambda inputs: self(inputs, mask))
        moved = (output.adversarial_inputs - x).abs().amax((0, 1))
        self.moved = moved[:, :4].max().item(), moved[:, 4:].max().item()
        expected = F.cross_entropy(self(output.adversarial_inputs, mask), y)
        if self.recipe == "pgd-at":
            torch.testing.assert_close(output.loss, expected)
        return output.loss


@pytest.mark.parametrize("recipe", ["pgd-at", "trades", "class-transport"])
def test_the_mixin_binds_other_arguments(recipe):
    module = Masked()
    module.recipe = recipe
    quiet_trainer(max_epochs=1, limit_train_batches=2).fit(module, digits_loaders()[0])
    assert module.moved[0] == pytest.approx(0.1, abs=1e-6)
    with pytest.raises(TypeError, match=r"attacks one tensor, got a tuple.*forward=lambda x: self\(x, mask\)"):
        module.defend((torch.rand(4, 1, 8, 8), torch.ones(8, 8)), torch.zeros(4, dtype=torch.long))


def test_the_mixin_defends_a_submodule():
    module = Masked()
    module.recipe = "pgd-at"
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    output = module.defend(images, labels, forward=module.net)
    torch.testing.assert_close(output.adversarial_outputs, module.net(output.adversarial_inputs))
    torch.testing.assert_close(output.loss, F.cross_entropy(module.net(output.adversarial_inputs), labels))


def test_recipes_that_compare_classes_say_where_there_are_none():
    class Regression(DigitsClassifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1] / 9)

    for recipe, works in (("trades", False), ("mart", False), ("pgd-at", True), ("sat-features", True), ("sat", True)):
        trainer = quiet_trainer(callbacks=[WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0)], **OPTIONS)
        if works:
            trainer.fit(Regression(), digits_loaders()[0])
        else:
            with pytest.raises(ValueError, match=r"compares probabilities of classes.*'pgd-at'"):
                trainer.fit(Regression(), digits_loaders()[0])

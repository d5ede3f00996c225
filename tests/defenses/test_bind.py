"""A recipe in a loop of the user's own: the same model as by the callback and by the mixin, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from torch import nn

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.defenses import RECIPES

THREAT = ThreatModel(eps=0.2)
BATCHES, EPOCHS = 3, 2


class Classifier(DigitsClassifier):
    """Draws its dropout from the same random numbers in every kind of loop: loaders and Trainers draw some too."""

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)


class Defended(WassersteinDefenseMixin, Classifier):
    def configure_defense(self):
        return self.recipe

    def training_step(self, batch, batch_idx):
        return self.defend(*batch).loss


def recipe_of(case):
    name = case.removesuffix("+awp")
    changes = {"awp": 0.01} if case.endswith("+awp") else {}
    return Recipe.named(name, THREAT, warmup_epochs=1.5, **changes)


def module_of(kind, recipe):
    seed_everything(0, verbose=False)
    module = kind(batch_norm=True)
    module.net.add_module("dropout", nn.Dropout(0.2))  # draws from the global random state in each forward pass
    module.recipe = recipe
    return module


def by_trainer(kind, recipe, callbacks):
    module = module_of(kind, recipe)
    trainer = quiet_trainer(max_epochs=EPOCHS, limit_train_batches=BATCHES, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(module, digits_loaders(shuffle=False)[0])
    return state_of(module)


def by_hand(recipe, restart_at=None):
    module = module_of(Classifier, recipe)
    optimizer = module.configure_optimizers()
    defense = recipe.bind(module, warmup_steps=recipe.warmup_epochs * BATCHES)
    batches = [batch for _, batch in zip(range(BATCHES), digits_loaders(shuffle=False)[0], strict=False)]
    outputs = []
    for step in range(EPOCHS * BATCHES):
        if step == restart_at:
            saved = copy.deepcopy(defense.state_dict())
            defense.detach()
            defense = recipe.bind(module, warmup_steps=recipe.warmup_epochs * BATCHES)
            defense.load_state_dict(saved)
        optimizer.zero_grad()
        torch.manual_seed(step % BATCHES)
        outputs.append(defense(*batches[step % BATCHES]))
        outputs[-1].loss.backward()
        optimizer.step()
    defense.detach()
    return state_of(module), outputs


def state_of(module):
    return torch.cat([each.detach().double().flatten() for each in module.state_dict().values()])


CASES = [*RECIPES, "trades+awp", "udr+awp"]


@pytest.mark.filterwarnings("ignore:Recipe")
@pytest.mark.parametrize("case", CASES)
def test_callback_mixin_and_own_loop_train_the_same_model(case):
    recipe = recipe_of(case)
    mine, outputs = by_hand(recipe)
    assert outputs[0].loss.ndim == 0
    if recipe.active:
        assert [round(output.logs["eps"] / 0.2, 3) for output in outputs[:5]] == [0.222, 0.444, 0.667, 0.889, 1.0]
    assert torch.equal(by_trainer(Classifier, recipe, [WassersteinDefense(recipe)]), mine)
    assert torch.equal(by_trainer(Defended, recipe, []), mine)


@pytest.mark.parametrize("case", ["pgd-at", "udr", "critic", "trades+awp"])
def test_continued_from_a_saved_state(case):
    assert torch.equal(by_hand(recipe_of(case))[0], by_hand(recipe_of(case), restart_at=4)[0])


class TestCall:
    def test_the_noise_is_that_of_the_seed_and_the_step(self):
        model, (inputs, labels) = DigitsClassifier(), next(iter(digits_loaders()[0]))

        def attacked(step, seed=0):
            return Recipe.named("pgd-at", THREAT).bind(model, seed=seed)(inputs, labels, step=step).adversarial_inputs

        assert torch.equal(attacked(3), attacked(3))
        assert not torch.equal(attacked(3), attacked(4))
        assert not torch.equal(attacked(3), attacked(3, seed=1))
        assert torch.equal(attacked(0), attacked(None))

    def test_a_step_that_is_repeated_counts_once(self):
        model, batch = DigitsClassifier(), next(iter(digits_loaders()[0]))
        defense = Recipe.named("pgd-at", THREAT).bind(model, warmup_steps=4)
        assert [defense(*batch, step=step).logs["eps"] for step in (7, 7, 8)] == pytest.approx([0.05, 0.05, 0.1])
        assert defense.state_dict()["batches"] == 2

    def test_other_arguments_of_the_model(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

            def forward(self, x, mask):
                return {"logits": self.net(x * mask)}

        model, (inputs, labels) = Masked(), next(iter(digits_loaders()[0]))
        mask = (torch.rand(8, 8) < 0.5).float()
        defense = Recipe.named("alp-features", THREAT).bind(model)
        output = defense(inputs, labels, forward=lambda x: model(x, mask))
        moved = (output.adversarial_inputs - inputs).abs().amax((0, 1))
        assert bool((moved[mask == 1] > 0.1).all())
        output.loss.backward()
        assert model.net[1].weight.grad.abs().sum() > 0

    def test_outputs_are_picked(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

            def forward(self, x):
                return torch.zeros(len(x)), self.net(x)

        inputs, labels = next(iter(digits_loaders()[0]))
        output = Recipe.named("trades", THREAT).bind(Two(), outputs=1)(inputs, labels)
        assert output.logs["discrepancy"] > 0

    def test_measured(self):
        model, batch = DigitsClassifier(), next(iter(digits_loaders()[0]))
        logs = Recipe.named("sat", THREAT).bind(model)(*batch, measure=True).logs
        assert {"clean_acc", "adversarial_acc", "attack_success", "transport_cost"} <= set(logs)

    def test_after_detach_the_model_is_as_before(self):
        model, batch = DigitsClassifier(), next(iter(digits_loaders()[0]))
        before = copy.deepcopy({key: repr(value) for key, value in vars(model).items() if key != "_modules"})
        defense = Recipe.named("class-transport", THREAT, awp=0.01).bind(model)
        weights = [parameter.clone() for parameter in model.parameters()]
        defense(*batch)  # without a backward pass, after which the weights would come back by themselves
        defense.detach()
        assert {key: repr(value) for key, value in vars(model).items() if key != "_modules"} == before
        assert all(map(torch.equal, weights, model.parameters()))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_loss_of_the_users_own(self):
        def task_loss(outputs, labels):
            return 2 * F.cross_entropy(outputs, labels)

        batch = next(iter(digits_loaders()[0]))
        one = Recipe.named("pgd-at", THREAT).bind(module_of(DigitsClassifier, None))(*batch)
        two = Recipe.named("pgd-at", THREAT, task_loss=task_loss).bind(module_of(DigitsClassifier, None))(*batch)
        torch.testing.assert_close(two.loss, 2 * one.loss)


class TestErrors:
    def test_a_model_that_is_no_module(self):
        with pytest.raises(TypeError, match=r"nn\.Module, got a function"):
            Recipe.named("pgd-at", THREAT).bind(lambda x: x)

    def test_several_inputs(self):
        defense = Recipe.named("pgd-at", THREAT).bind(DigitsClassifier())
        with pytest.raises(TypeError, match=r"one tensor, got a tuple.*forward=lambda"):
            defense((torch.rand(2, 1, 8, 8),) * 2, torch.tensor([0, 1]))

    def test_a_negative_warm_up(self):
        with pytest.raises(ValueError, match="warmup_steps must not be negative, got -1"):
            Recipe.named("pgd-at", THREAT).bind(DigitsClassifier(), warmup_steps=-1)

    @pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine"])
    def test_wrappers_that_cannot_be_attacked(self, name):
        wrapper = type(name, (nn.Module,), {})()
        with pytest.raises(TypeError, match=f"wrapped by {name} cannot be attacked: .*DistributedDataParallel"):
            Recipe.named("pgd-at", THREAT).bind(wrapper)

    def test_data_parallel(self):
        with pytest.raises(TypeError, match=r"DataParallel cannot be defended: .*DistributedDataParallel"):
            Recipe.named("pgd-at", THREAT).bind(nn.DataParallel(DigitsClassifier()))

    def test_gather_in_one_process_works_and_says_so_once(self):
        batch = next(iter(digits_loaders()[0]))
        alone = Recipe.named("sat", THREAT).bind(module_of(DigitsClassifier, None))(*batch)
        defense = Recipe.named("sat", THREAT, gather=True).bind(module_of(DigitsClassifier, None))
        with pytest.warns(UserWarning, match="gather=True compares the samples of all processes") as caught:
            outputs = [defense(*batch, step=0) for _ in range(2)]
        assert sum("gather" in str(each.message) for each in caught) == 1
        torch.testing.assert_close(outputs[0].loss, alone.loss, rtol=0, atol=0)

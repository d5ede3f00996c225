"""WassersteinDefense through the Trainer: what it adds, and what it leaves alone."""

from __future__ import annotations

import csv
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.learned import plain
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import FGSM, PGD, Execution
from lightning_wdefense.callbacks.schedule import noise_generator
from lightning_wdefense.defenses import RECIPES, CriticDiscrepancy
from lightning_wdefense.transport import (
    CriticTraining,
    WassersteinCritic,
    sinkhorn,
    sinkhorn_divergence,
    sliced_wasserstein,
)
from lightning_wdefense.transport.sliced.directions import orthogonal_directions

THREAT = ThreatModel(eps=0.2)
ACTIVE = [name for name in RECIPES if name != "standard"]
CASES = [*ACTIVE, "trades+awp", "udr+awp"]


PENALISED = "critic+gradient-penalty"


def case(name, **changes):
    """A recipe by its name, with weight perturbation or the critic's gradient penalty where that says so."""
    if name == PENALISED:
        return Recipe.named("critic", THREAT, discrepancy=CriticDiscrepancy(lipschitz="gradient-penalty"), **changes)
    name, *more = name.split("+")
    return Recipe.named(name, THREAT, **({"awp": 0.01} if more else {}), **changes)


def train(*callbacks, module=DigitsClassifier, loader=None, seed=0, **trainer):
    """Train a module (made after seeding, where a class or function is given) for a few batches and return it."""
    L.seed_everything(seed, verbose=False)
    module = module if isinstance(module, nn.Module) else module()
    loader = digits_loaders(shuffle=False)[0] if loader is None else loader
    options = {"max_epochs": 1, "limit_train_batches": 4, "callbacks": list(callbacks), **trainer}
    quiet_trainer(**options).fit(module, loader)
    return getattr(module, "_orig_mod", module)


def defend(recipe="pgd-at", **options):
    return WassersteinDefense(recipe, **{"threat": THREAT, "warmup_epochs": 0, **options})


def weights(module):
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


def parameters(module):
    return torch.cat([parameter.detach().clone().flatten() for parameter in module.parameters()])


def rows_of(logger):
    """What a CSVLogger wrote, a dict a row, without the empty cells."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if any(key.startswith("defense/") for key in row)]


def assert_same_weights(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class TestLeavesAlone:
    @pytest.mark.parametrize(
        "defense",
        [
            defend("standard"),
            defend("trades", weight=0.0),
            WassersteinDefense(Recipe(PGD(THREAT), "clean", "sinkhorn", 0.0, features="penultimate")),
        ],
        ids=["standard", "trades-0", "sinkhorn-0"],
    )
    def test_recipes_that_add_nothing_train_bit_for_bit_the_same(self, defense):
        plain = train(module=lambda: DigitsClassifier(batch_norm=True), max_epochs=2)
        assert_same_weights(plain, train(defense, module=lambda: DigitsClassifier(batch_norm=True), max_epochs=2))

    def test_global_random_state_is_the_users(self):
        # A module that draws random numbers in its step draws the same ones, attack or not.
        class Noisy(DigitsClassifier):
            def training_step(self, batch, batch_idx):
                number = torch.rand(()).item()
                if self.training:  # Lightning's own call; the first look is taken in eval mode
                    drawn.append(number)
                return super().training_step(batch, batch_idx)

        drawn: list[float] = []
        train(module=Noisy)
        train(defend("pgd-at"), module=Noisy)
        assert drawn[:4] == drawn[4:]

    def test_a_skipped_batch_stays_skipped(self):
        class Skipping(DigitsClassifier):
            def training_step(self, batch, batch_idx):
                return None if len(batch[0]) else self.loss(batch)

        before = weights(module := Skipping())
        train(defend("trades"), module=module)
        assert torch.equal(weights(module), before)

    def test_the_users_batch_is_not_changed(self):
        class Keeping(DigitsClassifier):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                seen.append(batch[0].clone())

        seen: list[torch.Tensor] = []
        loader, _ = digits_loaders(shuffle=False)
        train(defend("pgd-at"), module=Keeping(), loader=loader)
        for (x, _), kept in zip(loader, seen, strict=False):
            assert torch.equal(x, kept)

    @pytest.mark.parametrize(
        ("recipe", "passes"), [("pgd-at", 1), ("trades", 2), ("sat-features", 2), ("trades+awp", 2)]
    )
    def test_batchnorm_sees_the_branches_and_not_the_attack(self, recipe, passes):
        defense = WassersteinDefense(case(recipe, warmup_epochs=0))
        module = train(defense, module=DigitsClassifier(batch_norm=True), log_every_n_steps=1)
        assert int(module.net.norm.num_batches_tracked) == 4 * passes

    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
    @pytest.mark.parametrize("when", ["in a step", "before the first"])
    def test_an_exception_leaves_the_module_unwrapped_and_its_modes(self, error, when):
        class Failing(DigitsClassifier):
            def on_train_start(self):
                if when == "before the first":
                    raise error

            def training_step(self, batch, batch_idx):
                if batch_idx == 2:
                    raise error
                return super().training_step(batch, batch_idx)

        module = Failing(batch_norm=True)
        module.net.norm.eval()
        with pytest.raises((RuntimeError, SystemExit)):
            train(defend("sat-features"), module=module)
        assert "training_step" not in module.__dict__
        assert not module._forward_hooks
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
        assert not module.net.norm.training
        assert module.net.head.training

    @pytest.mark.parametrize("where", ["skipped", "step", "backward"])
    def test_perturbed_weights_come_back(self, where):
        """To the last bit, when the step is skipped, or fails before or in the backward pass."""

        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(ctx, loss):
                return loss.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise RuntimeError("in backward")

        class Unfortunate(DigitsClassifier):
            def training_step(self, batch, batch_idx):
                moved.append(not torch.equal(parameters(self), start))
                if where == "skipped":
                    return None
                loss = super().training_step(batch, batch_idx)
                if where == "step":
                    raise RuntimeError("in the step")
                return Failing.apply(loss)

        moved: list[bool] = []
        module = Unfortunate(batch_norm=True)
        start = parameters(module)
        with nullcontext() if where == "skipped" else pytest.raises(RuntimeError, match="in "):
            train(WassersteinDefense(case("pgd-at+awp", warmup_epochs=0), through="model"), module=module)
        assert moved
        assert all(moved)
        assert torch.equal(parameters(module), start)

    def test_an_attack_that_fails_leaves_the_modes(self):
        class FailingForward(DigitsClassifier):
            def forward(self, x):
                if not self.training:
                    raise RuntimeError("in the attack")
                return super().forward(x)

        with pytest.raises(RuntimeError, match="in the attack"):
            train(defend("pgd-at"), module=(module := FailingForward(batch_norm=True)))
        assert all(child.training for child in module.modules())
        assert "training_step" not in module.__dict__

    def test_a_previous_instance_attribute_is_restored(self):
        module = DigitsClassifier()
        own = module.training_step
        module.training_step = own
        train(defend("pgd-at"), module=module)
        assert module.__dict__["training_step"] is own

    def test_callbacks_stack_and_go_in_any_order(self):
        first, second = defend("pgd-at", name="first"), defend("trades", name="second")
        module = train(first, second)
        assert "training_step" not in module.__dict__
        assert first.state_key != second.state_key


def right(z, y):
    return z.softmax(1)[range(len(y)), y]


def boosted(z, y):
    """MART's cross-entropy, from probabilities, without its code's guard of 1e-4."""
    others = z.softmax(1).clone()
    others[range(len(y)), y] = 0
    return -(right(z, y).log() + (1 - others.max(1).values).log()).mean()


def kl(z, za):
    return (z.softmax(1) * (z.log_softmax(1) - za.log_softmax(1))).sum(1)


def within_classes(h, ha, y):
    label_cost = 10 * float((h - ha.mean(0)).pow(2).sum(1).mean())
    return sinkhorn(h, ha, label_cost=label_cost, x_labels=y, y_labels=y).value


def mmd_by_hand(z, za):
    points = torch.cat([z, za])
    distances = (points.unsqueeze(0) - points.unsqueeze(1)).pow(2).sum(2)
    signs = torch.tensor([1.0] * len(z) + [-1.0] * len(za), dtype=z.dtype) / len(z)
    scale = distances.detach().mean()
    return sum(signs @ torch.exp(-distances / (c * scale)) @ signs for c in (0.25, 0.5, 1, 2, 4)) / 5


def squared_slope_by_hand(net, x, z, za):
    """From the whole Jacobian, and the displacement along each projection to the sample of the same rank."""
    directions = orthogonal_directions(64, 10, torch.Generator().manual_seed(0)).to(z)
    lines, moved = (logits.detach() @ directions.T for logits in (z, za))
    matched = lines.sort(0).values.gather(0, moved.argsort(0).argsort(0))
    movement = (moved - matched) @ directions
    movement = movement / movement.norm(dim=1, keepdim=True)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: net(one[None])[0]))(x).flatten(2)
    return 10 * torch.einsum("nk,nkd->nd", movement, jacobian).square().sum(1).mean()


class TestLoss:
    """The same training written by hand, with the formulas from the papers."""

    FORMULAS = {  # noqa: RUF012
        "pgd-at": lambda z, za, h, ha, y: F.cross_entropy(za, y),
        "trades": lambda z, za, h, ha, y: (
            F.cross_entropy(z, y) + 6 * F.kl_div(F.log_softmax(za, 1), F.softmax(z, 1), reduction="batchmean")
        ),
        "alp": lambda z, za, h, ha, y: F.cross_entropy(za, y) + 0.5 * (z - za).pow(2).sum(1).mean(),
        "alp-features": lambda z, za, h, ha, y: F.cross_entropy(za, y) + 0.05 * (h - ha).pow(2).sum(1).mean(),
        "sat": lambda z, za, h, ha, y: F.cross_entropy(za, y) + sinkhorn_divergence(z, za),
        "sat-label": lambda z, za, h, ha, y: (
            F.cross_entropy(za, y) + sinkhorn_divergence(z, za, label_cost=100.0, x_labels=y, y_labels=y)
        ),
        "sat-features": lambda z, za, h, ha, y: F.cross_entropy(za, y) + 0.1 * sinkhorn_divergence(h, ha),
        "mart": lambda z, za, h, ha, y: boosted(za, y) + 5 * (kl(z, za) * (1 - right(z, y))).mean(),
        "class-transport": lambda z, za, h, ha, y: F.cross_entropy(za, y) + 0.1 * within_classes(h, ha, y),
        "mmd": lambda z, za, h, ha, y: F.cross_entropy(za, y) + mmd_by_hand(z, za),
        "coral": lambda z, za, h, ha, y: (
            F.cross_entropy(za, y) + (torch.cov(z.T) - torch.cov(za.T)).pow(2).sum() / (4 * 10**2)
        ),
        **dict.fromkeys(
            ["fast-at", "udr", "wrm", "sinkhorn-dro", "feature-scattering", "critic", "distributional-at"],
            lambda z, za, h, ha, y: F.cross_entropy(za, y),
        ),
        "distributional-trades": lambda z, za, h, ha, y: (
            F.cross_entropy(z, y) + 6 * F.kl_div(F.log_softmax(za, 1), F.softmax(z, 1), reduction="batchmean")
        ),
        "otjr": lambda z, za, h, ha, y: F.cross_entropy(za, y) + 5 * sliced_wasserstein(z, za).square(),
    }

    @pytest.mark.parametrize("recipe", ACTIVE)
    def test_equals_the_formula(self, recipe):
        # In float64: the sign of TRADES' first gradients is rounding noise in float32. The second batch sees what was learned from the first.
        options = {"precision": "64-true", "limit_train_batches": 2}
        defended = train(defend(recipe), **options)

        class ByHand(DigitsClassifier):
            attack, critic = RECIPES[recipe](THREAT).attack, None

            def training_step(self, batch, batch_idx):
                x, y = batch
                adversarial = self.attack(self, x, y, generator=noise_generator(self.trainer, 0, x.device))
                if recipe == "udr":
                    learned = self.attack.multiplier - 0.002 * (0.2 - (adversarial - x).abs().mean().item())
                    self.attack = replace(self.attack, multiplier=learned)
                features = [self.net[:-1](inputs) for inputs in (x, adversarial)]
                logits = [self.net[-1](feature) for feature in features]
                loss = TestLoss.FORMULAS[recipe](*logits, *features, y)
                if recipe == "otjr":
                    loss = loss + 0.01 * squared_slope_by_hand(self.net, x, *logits)
                if recipe == "critic":
                    self.critic = self.critic or CriticTraining(WassersteinCritic(32, classes=10).double())
                    self.critic.update(*features, y)
                    loss = loss + 0.1 * self.critic.critic.gap(*features, y)
                return loss

        torch.testing.assert_close(weights(defended), weights(train(module=ByHand, **options)), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("recipe", ["pgd-at", "trades"])
    def test_weight_perturbation_equals_the_formula(self, recipe):
        """The gradient of the step is that at the perturbed weights; the update starts from the true ones."""
        defended = train(
            WassersteinDefense(Recipe.named(recipe, THREAT, awp=0.02, warmup_epochs=0)), precision="64-true"
        )

        class ByHand(DigitsClassifier):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def loss_at(self, x, adversarial, y):
                features = [self.net[:-1](inputs) for inputs in (x, adversarial)]
                return TestLoss.FORMULAS[recipe](*[self.net[-1](feature) for feature in features], *features, y)

            def training_step(self, batch, batch_idx):
                x, y = batch
                attack = RECIPES[recipe](THREAT).attack
                adversarial = attack(self, x, y, generator=noise_generator(self.trainer, 0, x.device))
                true = {name: weight.detach().clone() for name, weight in self.named_parameters()}
                gradients = torch.autograd.grad(self.loss_at(x, adversarial, y), list(self.parameters()))
                with torch.no_grad():
                    for (name, weight), gradient in zip(self.named_parameters(), gradients, strict=True):
                        if "bias" not in name:
                            weight += 0.02 * weight.norm() * gradient / gradient.norm()
                self.optimizers().zero_grad()
                self.manual_backward(self.loss_at(x, adversarial, y))
                with torch.no_grad():
                    for name, weight in self.named_parameters():
                        weight.copy_(true[name])
                self.optimizers().step()

        torch.testing.assert_close(
            weights(defended), weights(train(module=ByHand, precision="64-true")), rtol=1e-5, atol=1e-6
        )
        plain = train(defend(recipe), precision="64-true")
        assert (weights(defended) - weights(plain)).abs().max() > 1e-4

    def test_the_other_branch_and_the_margin_have_weights(self):
        recipe = Recipe(PGD(THREAT), other_weight=0.5, margin_weight=0.3, warmup_epochs=0)

        class ByHand(DigitsClassifier):
            def training_step(self, batch, batch_idx):
                x, y = batch
                adversarial = recipe.attack(self, x, y, generator=noise_generator(self.trainer, 0, x.device))
                za = self(adversarial)
                return 0.7 * F.cross_entropy(za, y) + 0.3 * boosted(za, y) + 0.5 * F.cross_entropy(self(x), y)

        defended, expected = (
            weights(train(*callbacks, module=module, precision="64-true"))
            for callbacks, module in (([WassersteinDefense(recipe)], DigitsClassifier), ([], ByHand))
        )
        torch.testing.assert_close(defended, expected, rtol=1e-5, atol=1e-6)

    def test_eps_grows_over_the_warmup(self):
        seen = []

        class Recording(FGSM):
            def perturb(self, problem):
                seen.append(self.threat.eps)
                return super().perturb(problem)

        train(WassersteinDefense(Recipe(Recording(THREAT), warmup_epochs=1.5)), max_epochs=2)
        assert seen == pytest.approx([0.2 * min(1, (step + 1) / 6) for step in range(8)])

    @pytest.mark.parametrize("step_size", [None, 0.06])
    def test_steps_grow_with_the_radius(self, step_size):
        seen = []

        class Recording(PGD):
            def perturb(self, problem):
                seen.append((self.steps, self.steps * self._step / self.threat.eps))
                return super().perturb(problem)

        attack = Recording(THREAT, steps=10, step_size=step_size)
        train(WassersteinDefense(Recipe(attack, warmup_epochs=1.5, ramp_steps=True)), max_epochs=2)
        assert [steps for steps, _ in seen] == [2, 4, 5, 7, 9, 10, 10, 10]
        assert [reach for _, reach in seen] == pytest.approx([2.5 if step_size is None else 3.0] * 8)

    def test_the_attack_runs_as_it_is_told(self):
        dtypes = set()

        class Seeing(DigitsClassifier):
            def forward(self, x):
                outputs = super().forward(x)
                dtypes.add((self.training, outputs.dtype))
                return outputs

        recipe = Recipe(PGD(THREAT, steps=2), execution=Execution(precision="bf16"), warmup_epochs=0)
        train(WassersteinDefense(recipe, through="model"), module=Seeing)
        assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}

    def test_warmup_is_logged_under_accumulation(self, tmp_path):
        logger = CSVLogger(tmp_path)
        train(defend(warmup_epochs=1), accumulate_grad_batches=2, logger=logger, log_every_n_steps=1, max_epochs=2)
        assert [row["defense/eps"] for row in rows_of(logger)] == pytest.approx([0.1, 0.2, 0.2, 0.2])

    def test_training_that_ends_in_the_warmup_is_told(self):
        with pytest.warns(UserWarning, match="Training ended in the warm-up.* 20% of eps=0.2"):
            train(defend(warmup_epochs=5))

    def test_features_of_any_layer(self):
        by_path, penultimate = defend("sat-features", features="net.hidden_act"), defend("sat-features")
        assert_same_weights(train(by_path), train(penultimate))
        other = train(defend("sat-features", features="net.conv"))
        assert not torch.equal(weights(other), weights(train(penultimate)))

    def test_a_named_submodule_is_attacked(self):
        named = train(defend("sat-features", model="net"), module=HeadlessDigitsClassifier)
        assert_same_weights(named, train(defend("sat-features")))

    @pytest.mark.parametrize("format", ["tuple", "list", "dict", "namedtuple"])
    def test_batches_of_every_format(self, format):
        loader, _ = digits_loaders(format=format, shuffle=False)
        options = {"inputs": "image", "labels": "label"} if format == "namedtuple" else {}
        assert_same_weights(train(defend(**options), loader=loader), train(defend()))

    def test_soft_labels(self):
        class Soft(DigitsClassifier):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch[0], 0.9 * F.one_hot(batch[1], 10) + 0.01

        assert torch.isfinite(weights(train(defend("trades"), module=Soft()))).all()
        assert torch.isfinite(weights(train(defend("sat-label"), module=Soft()))).all()

    def test_regression_with_a_loss_of_its_own(self):
        class Regression(DigitsClassifier):
            def training_step(self, batch, batch_idx):
                return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

        attack = PGD(THREAT, loss=lambda outputs, labels: (outputs[:, 0] - labels).square())
        recipe = Recipe(attack, discrepancy="sinkhorn", weight=0.1, features="penultimate", warmup_epochs=0)
        assert torch.isfinite(
            weights(train(WassersteinDefense(recipe), module=Regression(), log_every_n_steps=1))
        ).all()


class Counting(DigitsClassifier):
    """Has a metric and an output of its own, and counts the calls of its step."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.calls_made = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy.update(logits, y)
        self.calls_made.append((batch_idx, len(x)))
        loss = F.cross_entropy(logits, y)
        self.log("train/loss", loss)
        return {"loss": loss, "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["extra"] == batch_idx


class TestLogging:
    @pytest.mark.parametrize("recipe", ACTIVE)
    def test_parts_and_measurements_reach_the_logger_and_the_step_runs_once_a_batch(self, recipe, tmp_path):
        logger = CSVLogger(tmp_path)
        module = train(defend(recipe), module=Counting(), logger=logger, log_every_n_steps=2)
        assert module.calls_made == [(index, 32) for index in range(4)]
        assert module.accuracy._update_count == 4
        rows = rows_of(logger)
        assert len(rows) == 2
        for row in rows:
            expected = row["defense/task_loss"]
            expected += row.get("defense/margin_loss", 0.0)
            if "defense/discrepancy" in row:
                expected += RECIPES[recipe](THREAT).weight * row["defense/discrepancy"]
            if "defense/jacobian" in row:
                expected += RECIPES[recipe](THREAT).jacobian_weight * row["defense/jacobian"]
            assert row["defense/loss"] == pytest.approx(expected, rel=1e-4)
            assert row["defense/eps"] == pytest.approx(0.2)
            for share in ("clean_acc", "adversarial_acc", "attack_success"):
                assert 0 <= row[f"defense/{share}"] <= 1
            assert row["defense/transport_cost"] >= -1e-4
            for name in ("gap", "distance", "penalty", "gradient_norm", "steps"):
                assert math.isfinite(row.get(f"defense/critic_{name}", math.nan)) == (recipe == "critic")
            assert "train/loss" in row  # the user's own

    def test_measurements_are_those_of_the_batch_that_is_logged(self, tmp_path):
        images, labels = (part[:128] for part in digits())
        labels = (labels + (torch.arange(128) % 32 < torch.arange(128) // 32 * 8)) % 10  # ever more wrong ones
        attack, logger = FGSM(ThreatModel(eps=0.05)), CSVLogger(tmp_path)
        module = trained_classifier()
        module.learning_rate = 0.0
        loader = DataLoader(TensorDataset(images, labels), 32)
        defense = WassersteinDefense(Recipe(attack, warmup_epochs=0))
        train(defense, module=module, loader=loader, logger=logger, log_every_n_steps=2)
        rows = rows_of(logger)
        assert [row["step"] for row in rows] == [1, 3]
        for row in rows:
            x, y = images.split(32)[int(row["step"])], labels.split(32)[int(row["step"])]
            z, za = module(x).detach(), module(attack(module, x, y)).detach()
            right, still = z.argmax(1) == y, za.argmax(1) == y
            assert row["defense/clean_acc"] == pytest.approx(right.float().mean().item())
            assert row["defense/adversarial_acc"] == pytest.approx(still.float().mean().item())
            assert row["defense/attack_success"] == pytest.approx(((right & ~still).sum() / right.sum()).item())
            assert row["defense/transport_cost"] == pytest.approx(sinkhorn_divergence(z, za).item(), rel=1e-3)

    def test_names_tell_callbacks_apart(self, tmp_path):
        logger = CSVLogger(tmp_path)
        train(defend(name="mine"), logger=logger, log_every_n_steps=1)
        assert "defense/mine/loss" in rows_of(logger)[-1]


LEARN_NOTHING = {"mart", "alp", "alp-features", "sat", "sat-label", "sat-features", "mmd", "coral"}
"""They are resumed as ``pgd-at`` and ``class-transport`` are: they differ in a function of outputs or features."""


class TestResuming:
    @pytest.mark.parametrize(
        "recipe", [pytest.param(name, marks=pytest.mark.slow if name in LEARN_NOTHING else ()) for name in CASES]
    )
    def test_a_resumed_run_ends_with_the_same_weights(self, recipe, tmp_path):
        def run(epochs, ckpt=None):
            L.seed_everything(0 if ckpt is None else 99, verbose=False)
            savers = [ModelCheckpoint(tmp_path, filename="half")] if epochs == 1 else []
            trainer = quiet_trainer(
                max_epochs=epochs,
                limit_train_batches=2,
                enable_checkpointing=bool(savers),
                callbacks=[defense := WassersteinDefense(case(recipe)), *savers],
            )
            trainer.fit(module := DigitsClassifier(batch_norm=True), digits_loaders(shuffle=False)[0], ckpt_path=ckpt)
            states.append(plain(defense.state_dict()))
            return module

        states = []

        whole = run(2)
        run(1)
        assert_same_weights(run(2, tmp_path / "half.ckpt"), whole)
        assert states[0] == states[2]
        learns = recipe.startswith(("udr", "critic"))
        assert (states[0] == {"batches": 4, "warmup": (2, 0.0), "multiplier": None, "critic": None}) == (not learns)
        assert states[1]["batches"] == 2

    def test_noise_differs_by_batch_rank_and_seed(self):
        def draw(seed=0, batch=0, rank=0):
            progress = SimpleNamespace(total=SimpleNamespace(completed=batch))
            loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
            trainer = SimpleNamespace(fit_loop=loop, global_rank=rank)
            return float(torch.rand((), generator=noise_generator(trainer, seed, torch.device("cpu"))))

        draws = [draw(), draw(seed=1), draw(batch=1), draw(rank=1), draw(seed=1, batch=1)]
        assert len(set(draws)) == len(draws)
        assert draw() == draws[0]


COMPILED = [
    pytest.param(recipe, how, marks=() if (recipe, how) in quick else pytest.mark.slow)
    for quick in [{("trades", "module"), ("sat-features", "in place"), ("critic", "submodule")}]
    for recipe in ("pgd-at", "trades", "sat-features", "pgd-at+awp", "critic", PENALISED)
    for how in ("module", "submodule", "in place")
]
"""Compilation takes seconds: each way and each kind of recipe once, all pairs of them among the slow tests."""


class TestPipelines:
    @pytest.mark.parametrize("recipe", CASES)
    def test_precision_and_accumulation(self, recipe):
        """In float64 every recipe is trained in ``TestLoss``."""
        module = DigitsClassifier(batch_norm=True)
        before = weights(module).clone()
        defense = WassersteinDefense(case(recipe, warmup_epochs=0))
        options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "limit_train_batches": 2}
        module = train(defense, module=module, log_every_n_steps=1, **options)
        assert torch.isfinite(weights(module)).all()
        assert not torch.equal(weights(module), before)

    def test_bf16_trains_the_same_model_to_rounding(self):
        exact = weights(train(defend("sat-features"), limit_train_batches=1))
        mixed = weights(train(defend("sat-features"), limit_train_batches=1, precision="bf16-mixed"))
        L.seed_everything(0, verbose=False)
        start = weights(DigitsClassifier())
        assert torch.cosine_similarity(exact - start, mixed - start, dim=0) > 0.8

    @pytest.mark.parametrize(("recipe", "how"), COMPILED)
    def test_compiled_modules(self, recipe, how):
        expected = train(WassersteinDefense(case(recipe, warmup_epochs=0)), log_every_n_steps=2)
        L.seed_everything(0, verbose=False)
        module = DigitsClassifier()
        if how == "module":
            module = torch.compile(module, backend="aot_eager")
        elif how == "submodule":
            module.net = torch.compile(module.net, backend="aot_eager")
        else:
            module.compile(backend="aot_eager")
        compiled = train(WassersteinDefense(case(recipe, warmup_epochs=0)), module=module, log_every_n_steps=2)
        torch.testing.assert_close(weights(compiled), weights(expected), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("recipe", ACTIVE)
    def test_weight_perturbation_and_averaging_combine_with_every_recipe(self, recipe):
        callbacks = pytest.importorskip("lightning.pytorch.callbacks")
        if not hasattr(callbacks, "EMAWeightAveraging"):
            pytest.skip("this Lightning has no EMAWeightAveraging")
        plain = train(WassersteinDefense(case(recipe, warmup_epochs=0)), limit_train_batches=2)
        defense = WassersteinDefense(case(f"{recipe}+awp", warmup_epochs=0))
        module = train(defense, callbacks.EMAWeightAveraging(), limit_train_batches=2)
        assert torch.isfinite(weights(module)).all()
        assert not torch.equal(weights(module), weights(plain))
        assert not module._forward_hooks

    def test_fit_twice_and_validate_between(self):
        defense = defend("sat-features")
        module = DigitsClassifier()
        train(defense, module=module)
        quiet_trainer(callbacks=[defense]).validate(module, digits_loaders()[1], verbose=False)
        train(defense, module=module)
        assert "training_step" not in module.__dict__


class NaN(DigitsClassifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class Manual(DigitsClassifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Twice(DigitsClassifier):
    def training_step(self, batch, batch_idx):
        self(batch[0])
        return super().training_step(batch, batch_idx)


class Convolutional(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    configure_optimizers = DigitsClassifier.configure_optimizers
    learning_rate = 1e-3


def module_with(**steps):
    return type("Module", (DigitsClassifier,), steps)()


def batches(change):
    return lambda: module_with(on_after_batch_transfer=lambda self, batch, dataloader_idx: change(*batch))


ERRORS = {
    "normalised inputs": (defend, batches(lambda x, y: ((x - 0.3) / 0.3, y)), ValueError, "mean and std are not set"),
    "wrong mean": (
        lambda: defend(threat=ThreatModel(mean=(0.1, 0.2, 0.3))),
        DigitsClassifier,
        ValueError,
        "mean has 3",
    ),
    "integer images": (defend, batches(lambda x, y: ((x * 255).byte(), y)), TypeError, r"x\.float\(\) / 255"),
    "labels out of range": (defend, batches(lambda x, y: (x, y + 5)), ValueError, "labels must lie in 0..9"),
    "labels of wrong shape": (defend, batches(lambda x, y: (x, y[:-1])), ValueError, r"labels have shape \(31,\)"),
    "no inputs": (defend, batches(lambda x, y: {"foo": x, "baz": x, "label": y}), ValueError, "'foo'.*inputs="),
    "no labels": (defend, batches(lambda x, y: {"image": x, "bar": y}), ValueError, "'bar'.*labels="),
    "only inputs": (defend, batches(lambda x, y: x), ValueError, "one tensor.*labels="),
    "unnamed submodule": (
        lambda: defend("trades", through="model"),
        lambda: DigitsClassifier(calls="net"),
        RuntimeError,
        "model=.*'net'.*through=\"step\"",
    ),
    "captured twice": (lambda: defend("trades", through="model"), Twice, RuntimeError, "ran 2 times.*model="),
    "no forward": (lambda: defend(through="model"), HeadlessDigitsClassifier, ValueError, "model=.*'net'"),
    "unknown model": (lambda: defend(model="nett"), DigitsClassifier, ValueError, "'net'"),
    "unknown features": (lambda: defend("sat", features="net.hiden"), DigitsClassifier, ValueError, "net.hidden"),
    "probabilities": (
        defend,
        lambda: module_with(forward=lambda s, x: s.net(x).softmax(1)),
        ValueError,
        "probabilities",
    ),
    "tuple outputs": (defend, lambda: module_with(forward=lambda s, x: (s.net(x), x)), TypeError, "not logits"),
    "manual optimisation": (defend, Manual, Exception, "WassersteinDefenseMixin"),
    "NaN task loss": (defend, NaN, FloatingPointError, "task_loss = nan"),
    "critic of another width": (
        lambda: with_critic(by_class=False, network=lambda shape: nn.Linear(7, 1)),
        DigitsClassifier,
        ValueError,
        r"network fails on points of shape \(N, 32\)",
    ),
    "critic with BatchNorm": (
        lambda: with_critic(
            by_class=False, network=lambda shape: nn.Sequential(nn.BatchNorm1d(*shape), nn.Linear(*shape, 1))
        ),
        DigitsClassifier,
        ValueError,
        "BatchNorm1d at '0'",
    ),
    "one sample": (
        lambda: defend("critic"),
        lambda: module_with(
            on_train_batch_start=lambda s, batch, i: [part.resize_(1, *part.shape[1:]) for part in batch] and None
        ),
        ValueError,
        "two samples or more",
    ),
    "NaN discrepancy": (
        lambda: WassersteinDefense(
            Recipe(PGD(THREAT), discrepancy=lambda a, b, labels: (a - b).sum() * math.nan, weight=1.0, name="mine")
        ),
        DigitsClassifier,
        FloatingPointError,
        "'mine'.*discrepancy = nan",
    ),
}


@pytest.mark.parametrize(("defense", "module", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors_in_training_say_what_to_do(defense, module, error, match):
    module = module()
    with pytest.raises(error, match=f"(?s){match}"):
        train(defense(), module=module)
    assert "training_step" not in module.__dict__


def with_critic(**settings):
    return defend(Recipe.named("critic", THREAT, discrepancy=CriticDiscrepancy(**settings)))


CONSTRUCTOR_ERRORS = {
    "unknown recipe": (lambda: WassersteinDefense("trade", threat=THREAT), "'trades'"),
    "no threat": (lambda: WassersteinDefense("trades"), "needs a threat model.*threat="),
    "another threat": (lambda: WassersteinDefense(Recipe.named("sat", THREAT), threat=ThreatModel(eps=0.1)), "differs"),
    "negative weight": (lambda: defend("sat", weight=-1), "weight"),
    "weight without discrepancy": (lambda: defend("pgd-at", weight=1.0), "needs a discrepancy"),
    "unknown discrepancy": (lambda: Recipe(PGD(THREAT), discrepancy="sinkhron", weight=1), "'sinkhorn'"),
    "no attack": (lambda: Recipe(None), "attack=None gives no adversarial inputs"),
    "no attack to perturb for": (lambda: Recipe(None, "clean", awp=0.01), "attack=None gives no adversarial inputs"),
    "negative perturbation": (lambda: Recipe.named("pgd-at", THREAT, awp=-0.1), "awp must not be negative"),
    "steps of another attack": (lambda: Recipe.named("fast-at", THREAT, ramp_steps=True), "needs PGD"),
    "unknown critic": (lambda: CriticDiscrepancy(lipschitz="orthogonall"), "'orthogonal'"),
    "a critic's own network": (lambda: CriticDiscrepancy(network=lambda shape: nn.Linear(*shape, 1)), "by_class=False"),
    "no critic's step": (lambda: CriticDiscrepancy(max_steps=0), "max_steps must be at least 1"),
    "a critic's rate": (lambda: CriticDiscrepancy(lr=2.0), "at most 1"),
    "a critic's width": (lambda: CriticDiscrepancy(width=7), "width must be even"),
    "a critic's penalty": (lambda: CriticDiscrepancy(penalty=0), "penalty must be positive"),
    "unknown branch": (lambda: Recipe(PGD(THREAT), sees="dirty"), "dirty"),
}


@pytest.mark.parametrize(("make", "match"), CONSTRUCTOR_ERRORS.values(), ids=CONSTRUCTOR_ERRORS)
def test_errors_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_feature_scattering_warns():
    with pytest.warns(UserWarning, match="fails under AutoAttack"):
        WassersteinDefense("feature-scattering", threat=THREAT)


def test_a_critic_made_for_a_batch_that_fails_is_not_kept():
    """The network is made for the features' width, which the next run's module may have otherwise."""
    defense = with_critic(by_class=False, network=lambda shape: nn.Linear(7, 1))
    with pytest.raises(ValueError, match="network fails"):
        train(defense)
    assert defense.state_dict()["critic"] is None


@pytest.mark.parametrize("recipe", ["udr", "critic"])
def test_a_second_run_learns_anew(recipe):
    defense = defend(recipe)
    train(defense)
    learned = plain(defense.state_dict())
    train(defense)
    assert plain(defense.state_dict()) == learned
    assert learned["multiplier"] < 1 if recipe == "udr" else learned["critic"]["critic"]["batches"] == 4


def test_an_equal_threat_beside_a_recipe_is_fine():
    assert WassersteinDefense(Recipe.named("sat", THREAT), threat=ThreatModel(eps=0.2)).recipe.name == "sat"


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharded_strategies_are_refused(strategy):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    sharded = type(strategy, (SingleDeviceStrategy,), {})(device="cpu")
    with pytest.raises(Exception, match=f"{strategy}.*ddp"):
        train(defend(), strategy=sharded, accelerator="auto", devices="auto")


def test_a_few_strays_warn_and_train():
    def stray(x, y):
        x = x.clone()
        x[0, 0, 0, 0] = 1.2
        return x, y

    with pytest.warns(UserWarning, match="widened"):
        train(defend(), module=batches(stray)())


def test_endless_dataloaders_need_a_limit():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.rand(1, 8, 8), 0

    loader = torch.utils.data.DataLoader(Endless(), batch_size=4)
    with pytest.raises(Exception, match="limit_train_batches"):
        train(defend(warmup_epochs=1), loader=loader, limit_train_batches=1.0, max_steps=3)
    train(defend(warmup_epochs=0), loader=loader, limit_train_batches=1.0, max_steps=3)


def test_a_submodule_made_in_configure_model():
    class Late(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.late, self.net = self.net, None

        def configure_model(self):
            if self.net is None:
                self.net = self.late
                del self.late

    assert_same_weights(train(defend("sat-features", model="net"), module=Late), train(defend("sat-features")))

"""Which way is chosen, and that both ways are one where they compute the same."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer
from torch import nn
from torchmetrics import Accuracy

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD
from lightning_wdefense.attacks.labels import replace_ignore_index
from lightning_wdefense.attacks.steps.inspection import inspect_step
from lightning_wdefense.attacks.steps.sites import InputSite
from lightning_wdefense.defenses import RECIPES
from lightning_wdefense.modules.batches import BatchReader
from lightning_wdefense.modules.steps import Step, unwrapped_step

pytestmark = pytest.mark.filterwarnings("ignore")
THREAT = ThreatModel(eps=0.1)
IMAGES, LABELS = (part[:32] for part in digits())


def module_with(step, forward=None, outputs=10):
    class Module(DigitsClassifier):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.net.head = nn.Linear(32, outputs)
            self.extra = nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            return step(self, *batch)

    if forward is not None:
        Module.forward = forward
    return Module()


def ce(logits, y, **options):
    return F.cross_entropy(logits, y, **options)


class Centres(nn.Module):
    """Proxies of classes, as metric learning has them."""

    def __init__(self):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(10, 16))

    def forward(self, embeddings, y):
        return F.cross_entropy(-torch.cdist(embeddings, self.proxies), y)


PIXELS = torch.where(
    torch.rand(32, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3, 255, (IMAGES[:, 0] > 0.5).long()
)
torch.manual_seed(3)
CENTRES, MASKS = Centres(), nn.Conv2d(1, 3, 3, padding=1)


def _margins(logits, y):
    """The runner-up against the own class."""
    return (logits.scatter(1, y[:, None], -9e9).amax(1) - logits.gather(1, y[:, None])[:, 0] + 9).relu().mean()


def _looked(module, x):
    with torch.no_grad():
        module(x)
    return module(x)


BITS = torch.stack([(LABELS >> bit) & 1 for bit in range(4)], 1).float()
EVEN = (LABELS % 2).float()
WEIGHTS = torch.linspace(0.5, 2, 10)
LOOKS = {
    # step, forward, outputs of the head, labels: is it a plain pass; where are the logits
    "plain": (lambda m, x, y: ce(m(x), y), None, 10, LABELS, True, "model"),
    "label smoothing": (lambda m, x, y: ce(m(x), y, label_smoothing=0.1), None, 10, LABELS, True, "model"),
    "class weights": (lambda m, x, y: ce(m(x), y, weight=WEIGHTS), None, 10, LABELS, True, "model"),
    "focal": (
        lambda m, x, y: ((1 - (-ce(m(x), y, reduction="none")).exp()) ** 2 * ce(m(x), y, reduction="none")).mean(),
        None,
        10,
        LABELS,
        False,  # it runs the model twice
        "model",
    ),
    "margin": (lambda m, x, y: F.multi_margin_loss(m(x), y, margin=50.0), None, 10, LABELS, True, "model"),
    "with a penalty": (lambda m, x, y: ce(m(x), y) + m.net.head.weight.square().sum(), None, 10, LABELS, True, "model"),
    "soft labels": (lambda m, x, y: ce(m(x), y), None, 10, F.one_hot(LABELS, 10).float(), True, "model"),
    "one logit": (
        lambda m, x, y: F.binary_cross_entropy_with_logits(m(x)[:, 0], y),
        None,
        1,
        EVEN,
        True,
        "model",
    ),
    "log-softmax": (
        lambda m, x, y: F.nll_loss(m(x), y),
        lambda m, x: m.net(x).log_softmax(1),
        10,
        LABELS,
        True,
        "model",
    ),
    "dictionary": (lambda m, x, y: ce(m(x)["out"], y), lambda m, x: {"out": m.net(x)}, 10, LABELS, True, "model"),
    "tuple": (lambda m, x, y: ce(m(x)[0], y), lambda m, x: (m.net(x), x), 10, LABELS, False, "model"),
    "auxiliary": (
        lambda m, x, y: ce(m(x)[1], y) + 0.3 * ce(m(x)[0], y),
        lambda m, x: (m.extra(x.flatten(1)), m.net(x)),
        10,
        LABELS,
        False,
        "model",
    ),
    "normalised": (lambda m, x, y: ce(m((x - 0.3) / 0.4), y), None, 10, LABELS, False, "model"),
    "flattened": (
        lambda m, x, y: ce(m(x.flatten(1)), y),
        lambda m, x: m.net(x.view(-1, 1, 8, 8)),
        10,
        LABELS,
        False,
        "model",
    ),
    "keyword": (lambda m, x, y: ce(m(x=x), y), None, 10, LABELS, False, "model"),
    "other argument": (lambda m, x, y: ce(m(x, 1.0), y), lambda m, x, s: m.net(x) * s, 10, LABELS, False, "model"),
    "twice": (lambda m, x, y: ce(m(x), y) + (m(x) - m(x.flip(-1))).square().mean(), None, 10, LABELS, False, "model"),
    "submodule": (lambda m, x, y: ce(m.net(x), y), None, 10, LABELS, False, "head"),
    "backbone, head": (lambda m, x, y: ce(m.net.head(m.net[:-1](x)), y), None, 10, LABELS, False, "head"),
    "sigmoid": (
        lambda m, x, y: F.binary_cross_entropy(m(x)[:, 0], y),
        lambda m, x: m.net(x).sigmoid(),
        1,
        EVEN,
        True,
        "head",
    ),
    "multi-label": (lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y), None, 4, BITS, True, None),
    "regression": (lambda m, x, y: F.mse_loss(m(x)[:, 0], y), None, 1, LABELS / 9, True, None),
    "regression on 0 and 1": (lambda m, x, y: F.mse_loss(m(x)[:, 0], y), None, 1, EVEN, True, None),
    "embeddings": (
        lambda m, x, y: (torch.cdist(m(x), m(x)) - (y[:, None] != y).float()).square().mean(),
        None,
        16,
        LABELS,
        False,
        None,
    ),
    "autoencoder": (lambda m, x, y: F.mse_loss(m(x), x.flatten(1)), None, 64, LABELS, True, None),
    "diverged": (lambda m, x, y: ce(m(x) * torch.nan, y), lambda m, x: m.net(x) * torch.nan, 10, LABELS, True, "model"),
    "softmax, then log": (
        lambda m, x, y: F.nll_loss(m(x).log(), y),
        lambda m, x: m.net(x).softmax(1),
        10,
        LABELS,
        True,
        "head",
    ),
    "log_softmax outside": (
        lambda m, x, y: F.nll_loss(m(x).log_softmax(1), y),
        None,
        10,
        LABELS,
        True,
        "model",
    ),
    "temperature": (lambda m, x, y: ce(m(x) / 4, y), None, 10, LABELS, True, "model"),
    "sum": (lambda m, x, y: ce(m(x), y, reduction="sum"), None, 10, LABELS, True, "model"),
    "crammer-singer": (
        lambda m, x, y: _margins(m(x), y),
        None,
        10,
        LABELS,
        True,
        "model",
    ),
    "proxies": (lambda m, x, y: CENTRES(m(x), y), None, 16, LABELS, True, None),
    "supervised contrast": (
        lambda m, x, y: ce(F.normalize(m(x)) @ F.normalize(m(x)).T, torch.arange(len(y))),
        None,
        64,
        LABELS,
        False,
        None,
    ),
    "autoencoder and labels": (
        lambda m, x, y: (m(x) - x.flatten(1)).abs().mean(),
        None,
        64,
        LABELS,
        True,
        None,
    ),
    "flatten in the step": (lambda m, x, y: ce(m.extra(x.flatten(1)), y), None, 10, LABELS, False, "head"),
    "kwargs": (lambda m, x, y: ce(m(**{"x": x}), y), None, 10, LABELS, False, "model"),
    "same values, copied": (
        lambda m, x, y: ce(m(x.clone().contiguous()), y),
        None,
        10,
        LABELS,
        True,
        "model",
    ),
    "reordered": (lambda m, x, y: ce(m(x.flip(0)), y.flip(0)), None, 10, LABELS, False, None),
    "half of the batch": (lambda m, x, y: ce(m(x[:16]), y[:16]), None, 10, LABELS, False, None),
    "two views": (lambda m, x, y: ce(m(torch.cat([x, x.flip(-1)])), torch.cat([y, y])), None, 10, LABELS, False, None),
    "under no_grad first": (lambda m, x, y: ce(_looked(m, x), y), None, 10, LABELS, False, "model"),
    "diverged regression": (
        lambda m, x, y: F.mse_loss(m(x)[:, 0] * torch.nan, y),
        None,
        1,
        LABELS / 9,
        True,
        None,
    ),
}


@pytest.mark.parametrize("case", LOOKS)
def test_first_look(case):
    step, forward, outputs, labels, plain, source = LOOKS[case]
    module = module_with(step, forward, outputs)
    site = InputSite(BatchReader(), (IMAGES, labels), THREAT)
    own = Step(module, unwrapped_step(module, "training_step"), "training_step", (0,))
    inspection = inspect_step(own, site, labels, module, lambda outputs: outputs)
    assert (inspection.plain, inspection.outputs) == (plain, source), inspection.reason
    assert inspection.differentiable
    assert bool(inspection.reason) != plain
    if case == "auxiliary":  # the first part that is a classifier's
        assert inspection.pick is not None


class Caught(PGD):
    """Keeps what it found."""

    found: list = []  # noqa: RUF012

    def perturb(self, problem):
        adversarial = super().perturb(problem)
        self.found.append(adversarial.clone())
        return adversarial


def trained(recipe, through, module=DigitsClassifier, **options):
    Caught.found.clear()
    torch.manual_seed(0)
    made = module()
    defense = WassersteinDefense(recipe, through=through)
    trainer = quiet_trainer(callbacks=[defense], **{"max_epochs": 1, "limit_train_batches": 4, **options})
    trainer.fit(made, digits_loaders(shuffle=False)[0])
    return made, list(Caught.found), {key: float(value) for key, value in trainer.callback_metrics.items()}


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_both_ways_find_the_same_inputs():
    recipe = Recipe(Caught(THREAT, steps=5), warmup_epochs=0)
    runs = [trained(recipe, through, log_every_n_steps=1) for through in ("model", "step")]
    (one, by_model, _), (other, by_step, logged) = runs
    fresh = DigitsClassifier()
    torch.manual_seed(0)
    fresh = DigitsClassifier()
    labels = digits()[1]
    with torch.no_grad():
        losses = [F.cross_entropy(fresh(found[0]), labels[:32]) for found in (by_model, by_step)]
    assert float((losses[0] - losses[1]).abs()) < 1e-4
    assert losses[0] > F.cross_entropy(fresh(IMAGES), LABELS) + 0.01
    torch.testing.assert_close(weights(one), weights(other), atol=2e-3, rtol=0)
    assert logged["defense/adversarial_loss"] > logged["defense/clean_loss"]


STEP_RECIPES = [name for name in RECIPES if name not in ("standard", "sinkhorn-dro")]


@pytest.mark.parametrize("name", STEP_RECIPES)
def test_every_recipe_is_the_same_either_way(name):
    """From the same start, in one batch, up to what restarts and rounding make of the attack."""
    recipe = Recipe.named(name, THREAT, warmup_epochs=0)
    runs = [trained(recipe, through, limit_train_batches=1, log_every_n_steps=1) for through in ("model", "step")]
    first, second = (run[2] for run in runs)
    for key in ("defense/task_loss", "defense/discrepancy", "defense/margin_loss", "defense/loss"):
        if key in first:
            assert second[key] == pytest.approx(first[key], rel=2e-2, abs=1e-4), key


def test_weights_are_perturbed_through_the_step_as_well():
    def losses(size):
        recipe = Recipe.named("pgd-at", THREAT, awp=size, warmup_epochs=0)
        runs = [trained(recipe, through, limit_train_batches=1) for through in ("model", "step")]
        return [run[2]["defense/loss"] for run in runs]

    by_model, by_step = losses(0.05)
    assert by_step == pytest.approx(by_model, rel=1e-3)
    assert by_step > losses(0.0)[1] + 0.01


class Norm(DigitsClassifier):
    def __init__(self):
        super().__init__(batch_norm=True)


def test_both_branches_feed_batch_norm_through_the_step():
    recipe = Recipe.named("trades", THREAT, warmup_epochs=0)
    one, other = (trained(recipe, through, module=Norm)[0] for through in ("model", "step"))
    assert one.net.norm.num_batches_tracked == other.net.norm.num_batches_tracked == 8
    torch.testing.assert_close(one.net.norm.running_mean, other.net.norm.running_mean, atol=1e-3, rtol=0)


class Mixing(DigitsClassifier):
    """MixUp in the step."""

    drawn: list = []  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        order, share = torch.randperm(len(batch[0])), float(torch.rand(()))
        self.drawn.append((self.training, share, tuple(order.tolist())))
        x = share * batch[0] + (1 - share) * batch[0][order]
        return share * ce(self(x), batch[1]) + (1 - share) * ce(self(x), batch[1][order])


def test_the_step_draws_alike_in_the_attack_and_in_both_branches():
    Mixing.drawn.clear()
    trained(Recipe.named("trades", THREAT, warmup_epochs=0), "auto", module=Mixing, limit_train_batches=2)
    own = [draw[1:] for draw in Mixing.drawn if draw[0]]
    assert len(own) == 4  # twice a batch
    assert own[0] == own[1] != own[2] == own[3]
    assert {draw[1:] for draw in Mixing.drawn} == set(own)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
def test_under_the_trainers_options(options):
    recipe = Recipe(Caught(THREAT, steps=3), warmup_epochs=0)
    module, found, _ = trained(recipe, "step", **options)
    images = digits()[0][:128].split(32)
    assert len(found) == 4
    for clean, moved in zip(images, found, strict=True):
        assert (moved.float() - clean).abs().max() == pytest.approx(0.1, abs=4e-3)
    assert weights(module).isfinite().all()


@pytest.mark.parametrize("part", [pytest.param("module", marks=pytest.mark.slow), "net"])
def test_compiled(part):
    def make():
        module = Norm()
        if part == "net":
            module.net = torch.compile(module.net, backend="eager")
            return module
        return torch.compile(module, backend="eager")

    plain, compiled = (
        trained(Recipe.named("alp-features", THREAT, warmup_epochs=0), "step", module=made, limit_train_batches=2)[0]
        for made in (Norm, make)
    )
    torch.testing.assert_close(weights(plain), weights(getattr(compiled, "_orig_mod", compiled)), atol=2e-3, rtol=0)


def test_the_users_metrics_count_once(tmp_path):
    class Counting(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.calls, self.losses = 0, []

        def training_step(self, batch, batch_idx):
            self.calls += 1
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    module, _, logged = trained(Recipe.named("trades", THREAT, warmup_epochs=0), "step", module=Counting)
    assert module.calls == len(module.losses) == 4
    assert logged["train/loss"] == pytest.approx(module.losses[-1])
    assert "training_step" not in vars(module)
    copy.deepcopy(module)


def test_by_hand_and_by_the_monitor():
    """Through the step, the monitor counts what plain passes count."""
    torch.manual_seed(0)
    module = DigitsClassifier()
    values = []
    for through in ("model", "step"):
        monitor = RobustnessMonitor(THREAT, ["pgd"], through=through, epsilons=[0.05])
        (logged,) = quiet_trainer(callbacks=[monitor]).validate(module, digits_loaders()[1], verbose=False)
        values.append(logged)
    assert values[0].keys() == values[1].keys()
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=1e-2, abs=1e-2), key


def test_the_last_smaller_batch_counts_through_the_step():
    class Normalising(DigitsClassifier):
        def validation_step(self, batch, batch_idx):
            logits = self.net((batch[0] - 0.3) / 0.4)
            self.log("val_loss", ce(logits, batch[1]), batch_size=len(batch[1]))
            self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    torch.manual_seed(0)
    module = Normalising()
    images, labels = digits()
    with torch.no_grad():
        labels = module.net((images[:20] - 0.3) / 0.4).argmax(1)
    labels[16:] = (labels[16:] + 1) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[:20], labels), 8)
    (logged,) = quiet_trainer(callbacks=[RobustnessMonitor(THREAT)]).validate(module, loader, verbose=False)
    assert logged["val/clean_acc"] == pytest.approx(0.8) == logged["accuracy"]
    assert logged["robust/accuracy"] == pytest.approx(logged["val/robust_acc"])


class InPlace(DigitsClassifier):
    """Writes to its batch: labels that begin with 1, and normalisation."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        y -= 1
        x.sub_(0.3).div_(0.4)
        return ce(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y -= 1
        x.sub_(0.3).div_(0.4)
        logits = self(x)
        self.log("val_loss", ce(logits, y))
        self.log("accuracy", (logits.argmax(1) == y).float().mean())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert torch.equal(batch[1], LABELS + 1)  # it wrote to the attacked batch
        assert torch.equal(batch[0], IMAGES)

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert torch.equal(batch[1], LABELS)  # once


@pytest.mark.parametrize("recipe", ["pgd-at", "alp-features"])
def test_a_step_that_writes_to_its_batch(recipe):
    loader = lambda: torch.utils.data.DataLoader([(x.clone(), y + 1) for x, y in zip(IMAGES, LABELS, strict=True)], 32)  # noqa: E731
    defense = WassersteinDefense(recipe, threat=THREAT, warmup_epochs=0)
    trainer = quiet_trainer(max_epochs=3, callbacks=[defense, RobustnessMonitor(THREAT)], log_every_n_steps=1)
    trainer.fit(InPlace(), loader(), loader())
    logged = trainer.callback_metrics
    assert logged["robust/accuracy"] <= logged["accuracy"]
    assert logged["val/clean_loss"] == pytest.approx(float(logged["val_loss"]), rel=1e-4)
    assert logged["robust/val_loss"] == pytest.approx(float(logged["val/robust_loss"]), rel=1e-4)
    assert logged["robust/val_loss"] > logged["val_loss"]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda m, x, y: ce(m((x - 0.3) / 0.4), y), "for training_step: Module was called on other values"),
        (lambda m, x, y: F.mse_loss(m(x), F.one_hot(y, 10).float()), "for training_step: the labels .* not .* classes"),
    ],
)
def test_why_the_step_is_taken_is_logged(step, why, caplog):
    module = module_with(step)
    module.validation_step = lambda batch, batch_idx: module.log("val_loss", step(module, *batch))
    callbacks = [WassersteinDefense("pgd-at", threat=THREAT), RobustnessMonitor(THREAT)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=1, limit_train_batches=2)
    with caplog.at_level("INFO", "lightning_wdefense"):
        trainer.fit(module, *digits_loaders())
    said = sorted(each.getMessage() for each in caplog.records if each.name.startswith("lightning_wdefense"))
    assert len(said) == 2  # once each, not at every batch
    assert re.search(why, said[0])
    assert "through validation_step of Module" in said[1]


class Detached(DigitsClassifier):
    def training_step(self, batch, batch_idx):
        return ce(self.net(batch[0].detach()), batch[1])


@pytest.mark.parametrize("through", ["auto", "step"])
def test_a_loss_that_does_not_depend_on_the_inputs_is_named(through):
    recipe = Recipe.named("pgd-at", THREAT)
    with pytest.raises(ValueError, match=r"loss of training_step of Detached does not depend on the inputs: .*detach"):
        trained(recipe, through, module=Detached)


@pytest.mark.parametrize("ignored", [255, -100])
def test_first_look_at_masks(ignored):
    labels = torch.where(PIXELS == 255, ignored, PIXELS)
    step = lambda m, x, y: ce(m(x), y, ignore_index=ignored)  # noqa: E731
    module = module_with(step, lambda m, x: MASKS(x))
    own = Step(module, unwrapped_step(module, "training_step"), "training_step", (0,))
    site = InputSite(BatchReader(), (IMAGES, labels), THREAT)
    inspection = inspect_step(own, site, replace_ignore_index(labels, ignored), module, lambda outputs: outputs)
    assert (inspection.plain, inspection.outputs) == (True, "model"), inspection.reason


def test_both_ways_train_the_same_weights_for_every_recipe():
    """Two batches; which recipes refuse a way is said here."""
    differences, refused = {}, []
    for name in RECIPES:
        recipe = Recipe.named(name, THREAT, warmup_epochs=0)
        try:
            runs = [trained(recipe, through, limit_train_batches=2) for through in ("model", "step")]
        except (ValueError, TypeError):
            refused.append(name)
            continue
        start, (one, other) = weights(_initial()), (weights(run[0]) for run in runs)
        moved = float((one - start).norm())
        differences[name] = float((one - other).norm()) / moved
    assert refused == []
    # Adam's first steps are signs: what rounding makes of a gradient near 0 is as large as a step.
    assert {name: value for name, value in differences.items() if value > 0.1} == {}, differences


def _initial():
    torch.manual_seed(0)
    return DigitsClassifier()


class Lbfgs(DigitsClassifier):
    def __init__(self):
        super().__init__()
        self.count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_lbfgs_calls_the_step_again_and_again():
    recipe = Recipe(Caught(THREAT, steps=2), warmup_epochs=0)
    runs = [trained(recipe, through, module=Lbfgs, limit_train_batches=2) for through in ("model", "step")]
    (one, first, _), (other, second, _) = runs
    assert one.count == other.count == len(first) == len(second) > 2
    torch.testing.assert_close(weights(one), weights(other), atol=2e-3, rtol=0)


class Remembering(DigitsClassifier):
    """Keeps metrics, an average of its weights and a list, and draws in its step."""

    def __init__(self):
        super().__init__(batch_norm=True)
        self.accuracy, self.plain = Accuracy("multiclass", num_classes=10), [Accuracy("multiclass", num_classes=10)]
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.state, self.losses, self.count = {"head": self.net.head.weight.detach().clone()}, [], 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self((x + 0.05 * torch.rand_like(x) - 0.3) / 0.4)
        loss = ce(logits, y)
        self.count += 1
        self.losses.append(loss.item())
        self.accuracy(logits, y)
        self.plain[0].update(logits, y)
        self.log("acc", self.accuracy, on_step=True, on_epoch=True)
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.5)
            self.state["head"].lerp_(self.net.head.weight, 0.5)
        return loss


@pytest.mark.parametrize("name", ["pgd-at", "trades", "class-transport"])
def test_what_a_step_keeps_is_moved_once_a_batch(name):
    module, _, _ = trained(Recipe.named(name, THREAT, warmup_epochs=0), "auto", module=Remembering)
    assert module.count == len(module.losses) == module.plain[0]._update_count == 4
    torch.manual_seed(0)
    expected = Remembering()
    # The average and the plain state saw the same weights, once a batch.
    torch.testing.assert_close(module.average.head.weight, module.state["head"], atol=0, rtol=0)
    assert not torch.equal(module.average.head.weight, expected.average.head.weight)


def test_a_resumed_training_through_the_step_is_the_uninterrupted_one(tmp_path):
    def trainer(epochs):
        defense = WassersteinDefense("trades", threat=THREAT, warmup_epochs=2)
        return quiet_trainer(max_epochs=epochs, callbacks=[defense], limit_train_batches=3)

    def module():
        torch.manual_seed(0)
        return Quiet()

    whole, first, second = module(), module(), module()
    loader = digits_loaders(shuffle=False)[0]
    trainer(3).fit(whole, loader)
    begun = trainer(1)
    begun.fit(first, loader)
    begun.save_checkpoint(tmp_path / "last.ckpt")
    trainer(3).fit(second, loader, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(whole), weights(second))


class Quiet(DigitsClassifier):
    """Goes through the step, and draws nothing."""

    def training_step(self, batch, batch_idx):
        return ce(self.net((batch[0] - 0.3) / 0.4), batch[1])


@pytest.mark.parametrize("through", ["model", "step"])
def test_the_passes_of_a_weight_perturbation_feed_no_batch_norm(through):
    def statistics(size):
        recipe = Recipe.named("pgd-at", THREAT, awp=size, warmup_epochs=0)
        return trained(recipe, through, module=Norm, limit_train_batches=1)[0].net.norm.running_mean

    torch.testing.assert_close(statistics(1e-12), statistics(0.0), atol=1e-6, rtol=0)

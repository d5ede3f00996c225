"""The Wasserstein attack at its public face: what it returns is feasible, strong, and works where other attacks do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer, trained_classifier
from support.modules import batch, classifier
from support.plans import Program
from torch import Tensor, nn

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import WassersteinAttack, get_attack, wasserstein_feasibility
from lightning_wdefense.attacks.wasserstein.ascent import steepest
from lightning_wdefense.attacks.wasserstein.attack import WorstImages
from lightning_wdefense.attacks.wasserstein.linear_oracle import best_plan
from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport, square
from lightning_wdefense.attacks.wasserstein.projection import feasible_plan, nearest_plan


def ball(eps: float, **options) -> ThreatModel:
    return ThreatModel(norm="wasserstein", eps=eps, **options)


THREAT = ball(0.1)


def right(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(1) == labels


# --- feasible

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIPELINES = {
    "data units": {},
    "0 to 255": {"bounds": (0.0, 255.0)},
    "no bounds": {"bounds": None},
    "normalised": {"mean": MEAN, "std": STD},
    "normalised 0 to 255": {
        "bounds": (0.0, 255.0),
        "mean": [255 * value for value in MEAN],
        "std": [255 * value for value in STD],
    },
}
SIZES = {"3, p=1": (3, 1), "3, p=2": (3, 2), "5, p=1": (5, 1), "5, p=2": (5, 2)}


class InDataUnits(nn.Module):
    """A classifier of images in [0, 1] behind a pipeline's units."""

    def __init__(self, model: nn.Module, threat: ThreatModel) -> None:
        super().__init__()
        self.model, self.threat = model, threat

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(self.threat.to_data(inputs) / (self.threat.bounds or (0, 1.0))[1])


@pytest.mark.parametrize(
    ("pipeline", "size", "p", "eps"),
    [
        pytest.param(pipeline, *[*SIZES.values()][(i + 2 * j) % 4], eps, id=f"{name}-{eps}")
        for i, (name, pipeline) in enumerate(PIPELINES.items())
        for j, eps in enumerate([0.05, 0.6])
    ],
)
def test_colour_images_stay_feasible(pipeline, size, p, eps):
    """All three constraints, of images that are not square, are white or black in places, and one of which is white nearly everywhere."""
    threat = ball(eps, **pipeline)
    data = (2 * torch.rand(4, 3, 6, 9) - 0.5).clamp(0, 1)
    data[0, :, :, 1:] = 1.0
    inputs = threat.to_model(data * (threat.bounds or (0, 1.0))[1])
    model = InDataUnits(classifier(3, 6, 9), threat)
    attack = WassersteinAttack(threat, steps=6, neighbourhood=size, p=p)
    adversarial = attack(model, inputs, model(inputs).argmax(1))
    found = wasserstein_feasibility(inputs, adversarial, threat, neighbourhood=size, p=p)
    assert found.feasible(threat.eps).all(), found
    assert (found.cost[1:] > 0.3 * eps).all(), "the budget is there to be spent"
    if threat.bounds is None:
        assert threat.to_data(adversarial).max() > 1.0


@pytest.mark.parametrize(("size", "p"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "options", [{"methods": "projected"}, {"methods": "frank-wolfe"}, {"early_exit": True}], ids=str
)
def test_digits_stay_feasible(digits_cnn, size, p, options):
    plain, _, x, y = digits_cnn
    attack = WassersteinAttack(ball(0.2), steps=12, neighbourhood=size, p=p, **options)
    adversarial = attack(plain, x[:10], y[:10])
    found = wasserstein_feasibility(x[:10], adversarial, attack.threat, neighbourhood=size, p=p)
    assert found.feasible(0.2).all(), found


def test_no_mass_changes_its_channel():
    inputs = torch.rand(4, 3, 6, 6)
    inputs[:, 1] = 0
    model = classifier(3, 6, 6)
    adversarial = WassersteinAttack(ball(0.5), steps=3)(model, inputs, model(inputs).argmax(1))
    assert not adversarial[:, 1].any()
    torch.testing.assert_close(adversarial.sum((2, 3)), inputs.sum((2, 3)), rtol=1e-5, atol=1e-5)
    assert not torch.equal(adversarial, inputs)


def test_dim_images_move_as_far_as_bright_ones():
    """The mass is relative to the image's."""
    model = classifier(1, 6, 6)
    inputs = torch.rand(4, 1, 6, 6)
    attack = WassersteinAttack(ball(0.3), steps=8)
    for scale in (0.01, 1.0):
        adversarial = attack(model, scale * inputs, torch.zeros(4, dtype=torch.long))
        found = wasserstein_feasibility(scale * inputs, adversarial, attack.threat)
        assert found.feasible(0.3).all()
        assert (found.cost > 0.1).all()


# --- strong


@pytest.mark.parametrize(("bounds", "largest"), [((0.0, 1.0), 0.06), (None, 0.01)], ids=["box", "no box"])
def test_reaches_the_optimum_of_a_linear_model(bounds, largest):
    """What it gains is the linear program's optimum, of which little is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 7, 2)).double()
    inputs = (2 * torch.rand(6, 2, 6, 7, dtype=torch.float64) - 0.5).clamp(0, 1)
    labels = torch.arange(6) % 2
    weight = model[1].weight.detach()
    worth = torch.stack([weight[1 - label] - weight[label] for label in labels]).view_as(inputs)
    threat = ball(0.25, bounds=bounds)
    adversarial = WassersteinAttack(threat, loss="margin")(model, inputs, labels)
    gain = ((adversarial - inputs) * worth).sum((1, 2, 3))
    programs = [Program.of(x, 0.25 * float(x.sum()), bounds and 1.0, 5, 1) for x in inputs]
    most = worth.new_tensor([each.most(value) for each, value in zip(programs, worth, strict=True)])
    gap = 1 - gain / (most - (inputs * worth).sum((1, 2, 3)))
    assert gap.min() > -1e-4, "more than the most: not legal"
    assert gap.max() < largest


def test_does_harm_at_small_radii_and_more_at_larger_ones(digits_cnn):
    plain, robust, x, y = digits_cnn
    x, y = x[:50], y[:50]
    for model in (plain, robust):
        left = [right(model, x, y).float().mean()]
        for eps in (0.02, 0.05, 0.2):
            adversarial = WassersteinAttack(ball(eps), steps=12, restarts=1)(model, x, y)
            left.append(right(model, adversarial, y).float().mean())
        assert left[0] > left[1] > left[2] + 0.2 > left[3] + 0.6, left
        assert left[3] < 0.05


def published(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Frank-Wolfe or projected ascent whose steps do not know the box, made feasible at the end by the same repair."""
    transport = LocalTransport.of(x, eps * x.sum((1, 2, 3)), torch.ones_like(x), square(5, 1))
    plan = transport.identity_plan()
    for step in range(steps):
        point = transport.transported(plan).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        if name == "frank-wolfe":
            plan = torch.lerp(plan, best_plan(transport, steepest(gradient)), 2 / (step + 2))
        else:
            plan = nearest_plan(transport, plan + transport.gather_neighbours(0.1 * steepest(gradient)), iterations=30)
    return transport.transported(feasible_plan(transport, plan))


@pytest.mark.parametrize("eps", [0.05, pytest.param(0.15, marks=pytest.mark.slow)])
def test_stronger_than_attacks_that_are_repaired_only_at_the_end(digits_cnn, eps):
    """Worst of both, sample by sample, and with as many steps."""
    _, model, x, y = digits_cnn
    x, y = x[:70], y[:70]
    theirs = right(model, x, y)
    for name in ("frank-wolfe", "projected"):
        theirs &= right(model, published(name, model, x, y, eps, 20), y)
    ours = right(model, WassersteinAttack(ball(eps), steps=20, restarts=1)(model, x, y), y)
    assert ours.sum() < theirs.sum()


class Thresholded(nn.Module):
    """As models defended against L-infinity see their inputs: nearly black and white, so that gradients come and go and plans go to and fro."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(torch.sigmoid(15 * (inputs - 0.5)))


@pytest.mark.parametrize(
    ("options", "spent", "left"),
    [
        ({"methods": "projected", "restarts": 1}, 0.99, 6),
        ({"methods": "frank-wolfe", "restarts": 1}, 0.95, 4),
        pytest.param({}, 0.99, 2, marks=pytest.mark.slow),
    ],
    ids=["projected", "frank-wolfe", "all"],
)
def test_the_image_spends_the_budget_and_not_only_its_plan(digits_cnn, options, spent, left):
    """By exact transport. Where plans kept what had become a detour the median was .91, .90 and .90, and of the 40 images 8, 5 and 3 were left."""
    model = Thresholded(digits_cnn[1])
    x = digits_cnn[2][:40]
    with torch.no_grad():
        y = model(x).argmax(1)
    threat = ball(0.15)
    adversarial = WassersteinAttack(threat, **options)(model, x, y)
    found = wasserstein_feasibility(x, adversarial, threat)
    assert found.feasible(0.15).all()
    assert found.cost.median() > spent * 0.15
    assert right(model, adversarial, y).sum() <= left


def test_each_round_and_each_method_only_makes_it_worse(digits_cnn):
    _, model, x, y = digits_cnn
    x, y = x[:150], y[:150]

    def left(**options) -> Tensor:
        return right(model, WassersteinAttack(THREAT, steps=4, **options)(model, x, y), y)

    one, many, single = left(restarts=1), left(restarts=4), left(restarts=1, methods="projected")
    assert not (many & ~one).any()
    assert not (one & ~single).any()
    assert many.sum() < one.sum() < single.sum()


def test_a_sample_that_fell_stays_fallen():
    """Nothing that is classified correctly takes the place of an image that is not, whatever its loss."""
    found, index = WorstImages(torch.zeros(1, 1, 2, 2), None), torch.tensor([0])
    for loss, fooled in ((1.0, False), (2.0, True), (3.0, False), (4.0, False)):
        found.keep(index, torch.full((1, 1, 2, 2), loss), torch.tensor([fooled]), torch.tensor([loss]))
    assert found.fooled.all()
    assert (found.images == 2).all()


def test_other_noise_other_restarts():
    model = classifier(1, 6, 6, scale=0.1)
    inputs, _ = batch(1, 6, 6)
    attack = WassersteinAttack(THREAT, steps=2, loss="kl")
    first, second = attack(model, inputs), replace(attack, seed=1)(model, inputs)
    assert not torch.equal(first, second)


# --- early exit


@pytest.mark.parametrize("loss", ["ce", "margin", None])
def test_early_exit_breaks_the_same_samples(digits_cnn, loss):
    plain, _, x, y = digits_cnn
    x, y = x[:60], y[:60].clone()
    y[:5] = (y[:5] + 1) % 10
    seen = []
    handle = plain.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    attack = WassersteinAttack(ball(0.05), steps=8, methods="projected", restarts=1, loss=loss)
    try:
        thorough = attack(plain, x, y)
        passes, _ = sum(seen), seen.clear()
        quick = replace(attack, early_exit=True)(plain, x, y)
    finally:
        handle.remove()
    assert torch.equal(right(plain, thorough, y), right(plain, quick, y))
    assert 0.2 < right(plain, quick, y).float().mean() < 0.9, "too easy or too hard to show anything"
    assert torch.equal(quick[:5], x[:5]), "those that are wrong already are not touched"
    assert sum(seen) < 0.8 * passes
    some = slice(5, 30)
    found = wasserstein_feasibility(x[some], quick[some], THREAT).cost.mean()
    assert found < wasserstein_feasibility(x[some], thorough[some], THREAT).cost.mean()


# --- losses and labels


def test_a_callable_loss_and_soft_labels_are_the_same_losses():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=20)
    attack = WassersteinAttack(THREAT, steps=3, loss="ce", restarts=1)
    expected = attack(model, inputs, labels)
    soft = attack(model, inputs, F.one_hot(labels, 5).float())
    torch.testing.assert_close(soft, expected, atol=1e-3, rtol=0)

    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["class"], reduction="none")

    own = replace(attack, loss=loss)(model, inputs, {"class": labels})
    before, after, named = (F.cross_entropy(model(each), labels, reduction="none") for each in (inputs, own, expected))
    assert (after > before).all()
    assert (after >= named - 1e-4).all(), "of a loss that does not say what is wrong the largest counts"


def test_kl_needs_no_labels():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=20)
    adversarial = WassersteinAttack(ball(0.3), steps=5, loss="kl")(model, inputs)
    assert (model(adversarial).argmax(1) != labels).float().mean() > 0.2
    assert wasserstein_feasibility(inputs, adversarial, ball(0.3)).feasible(0.3).all()


def test_regression():
    model = nn.Sequential(classifier(1, 6, 6), nn.Linear(5, 1))
    inputs, target = torch.rand(8, 1, 6, 6), torch.zeros(8, 1)
    adversarial = WassersteinAttack(THREAT, steps=3, loss=lambda z, y: (z - y) ** 2)(model, inputs, target)
    assert (model(adversarial).abs() >= model(inputs).abs()).all()
    assert (model(adversarial).abs() > model(inputs).abs() + 1e-3).float().mean() > 0.8


def test_only_some_samples():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    inputs[0] = 0  # has no mass, and is not asked for
    attack = WassersteinAttack(THREAT, steps=3)
    for only in (torch.tensor([2, 5]), torch.arange(8) % 2 == 1):
        adversarial = attack(model, inputs, labels, samples=only)
        changed = (adversarial != inputs).flatten(1).any(1)
        expected = torch.zeros(8, dtype=torch.bool)
        expected[only] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("half", ["autocast", "model"])
def test_float16_gradients_do_not_underflow(half):
    """A confident model's gradients, near 1e-8, are nothing in float16."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([19.0, 0.0, 0.0]))
    inputs, labels = torch.rand(8, 1, 6, 6), torch.zeros(8, dtype=torch.long)
    attack = WassersteinAttack(ball(0.2), steps=3, loss="ce")
    if half == "model":
        adversarial = attack(model.half(), inputs.half(), labels)
    else:
        with torch.autocast("cpu", torch.float16):
            adversarial = attack(model, inputs, labels)
    moved = (adversarial.float() - inputs).abs().flatten(1).amax(1)
    assert (moved > 0.05).all()


# --- where users need it

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*validation_step", "ignore:.*num_workers")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(WassersteinAttack(THREAT, steps=3, methods="frank-wolfe", restarts=1), warmup_epochs=1),
        Recipe.named("trades", THREAT, warmup_epochs=1),
        pytest.param(Recipe.named("class-transport", THREAT, warmup_epochs=1), marks=pytest.mark.slow),
    ],
    ids=["own", "trades", "class-transport"],
)
def test_trains_and_is_measured_in_lightning(recipe):
    torch.manual_seed(0)
    module = DigitsClassifier(learning_rate=1e-2)
    attack = WassersteinAttack(THREAT, steps=4, restarts=1)
    callbacks = [WassersteinDefense(recipe), RobustnessMonitor(THREAT, attacks=[attack], epsilons=[0.02, 0.1])]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2, check_val_every_n_epoch=2)
    trainer.fit(module, *digits_loaders(train_size=512, val_size=32))
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert 0 <= values["val/robust_acc"] <= values["val/auac"] < values["val/clean_acc"]
    images, labels = (part[512:544] for part in digits())
    module.eval()
    expected = (right(module, attack(module, images, labels), labels) & right(module, images, labels)).float().mean()
    assert values["val/robust_acc"] == pytest.approx(expected.item(), abs=0.01)
    assert values["val/clean_acc"] > 0.25
    assert values["defense/eps"] == pytest.approx(0.1)


def test_measured_by_name():
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(ball(0.2), attacks=["wasserstein"])], limit_val_batches=1)
    trainer.validate(trained_classifier(), digits_loaders(batch_size=16)[1], verbose=False)
    values = trainer.callback_metrics
    assert values["val/robust_acc_wasserstein"] == values["val/robust_acc"] < values["val/clean_acc"] - 0.5


@pytest.mark.slow
def test_training_with_it_helps():
    """A few epochs of adversarial training leave more under the attack than training without it."""
    images, labels = (part[1100:1200] for part in digits())
    loader, left = digits_loaders(train_size=1024)[0], {}
    for name in ("standard", "pgd-at"):
        torch.manual_seed(0)
        module = DigitsClassifier()
        attack = WassersteinAttack(ball(0.05), steps=3, methods="frank-wolfe", restarts=1)
        recipe = Recipe.named(name, ball(0.05), warmup_epochs=1, **({"attack": attack} if name == "pgd-at" else {}))
        quiet_trainer(callbacks=[WassersteinDefense(recipe)], max_epochs=3).fit(module, loader)
        adversarial = WassersteinAttack(ball(0.05), steps=8, restarts=1)(module, images, labels)
        left[name] = right(module.eval(), adversarial, labels).float().mean()
    assert left["pgd-at"] > left["standard"] + 0.1, left


def test_registered_by_name():
    assert get_attack("wasserstein", THREAT, methods="frank-wolfe") == WassersteinAttack(
        THREAT, methods=("frank-wolfe",)
    )

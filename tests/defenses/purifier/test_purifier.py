"""A purifier does what its critic says, is attacked through, and leaves the classifier, and a resumed run, as they were."""

from __future__ import annotations

import copy

import lightning as L
import ot
import pytest
import torch
from support.learned import plain
from support.lightning_modules import digits, digits_loaders, quiet_trainer, trained_classifier
from support.modules import Nasty, Snapshot, classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import PGD, AutoAttack, worst_case
from lightning_wdefense.defenses import CriticDiscrepancy, PurifiedClassifier, ResidualGenerator, WassersteinPurifier

THREAT = ThreatModel(eps=0.2)
FAST = PGD(THREAT, steps=3)
PARTS = {"critic": "critic_gap", "reconstruction": "reconstruction", "task": "task_loss"}


def purifier_of(model=None, threat=THREAT, **options):
    model = trained_classifier() if model is None else model
    options = {"attack": PGD(threat, steps=3), "evaluation": PGD(threat, steps=3)} | options
    return WassersteinPurifier(model, threat, **({"generator": ResidualGenerator(64)} | options))


def loader(size=64, batch_size=32, change=None):
    """Training digits in a fixed order, whose loader draws no global random numbers."""
    images, labels = digits()
    images = images[:size] if change is None else change(images[:size])
    return DataLoader(TensorDataset(images, labels[:size]), batch_size, generator=torch.Generator())


def fitted(purifier, train=None, **options):
    trainer = quiet_trainer(log_every_n_steps=1, **options)
    trainer.fit(purifier, train or loader())
    return trainer


def robust(model, inputs, labels, steps=20):
    return float(worst_case(model, {"pgd": PGD(THREAT, steps=steps)}, inputs, labels).robust.float().mean())


@pytest.fixture(scope="module")
def trained():
    """Purifiers trained the usual way and through, and held-out digits."""
    found = {}
    for through in (False, True):
        found[through] = purifier_of(generator=ResidualGenerator(64, width=128), through=through, lr=3e-3)
        fitted(found[through], digits_loaders(64, shuffle=False)[0], max_epochs=12)
    images, labels = digits()
    return found, images[-200:], labels[-200:]


def test_purified_inputs_are_nearer_to_the_clean_distribution(trained):
    purifiers, clean, labels = trained
    attacked = PGD(THREAT, steps=10)(purifiers[False].purified.classifier, clean, labels)
    with torch.no_grad():
        purified = purifiers[False](attacked)

    def exact(images):  # W_1
        cost = torch.cdist(clean.flatten(1), images.flatten(1)).double().numpy()
        return ot.emd2([], [], cost)

    assert exact(purified) < 0.8 * exact(attacked)


def test_the_usual_way_looks_excellent_and_is_worthless(trained):
    purifiers, clean, labels = trained
    usual, through = purifiers[False].purified, purifiers[True].purified
    attacked = PGD(THREAT, steps=20)(usual.classifier, clean, labels)
    with torch.no_grad():
        naive = float((usual(attacked).argmax(1) == labels).float().mean())
    assert robust(usual.classifier, clean, labels) < 0.05
    assert naive > 0.6
    assert robust(usual, clean, labels) < 0.1
    assert robust(through, clean, labels) > robust(usual, clean, labels) + 0.1


def smooth_model():
    generator = ResidualGenerator(4, width=8).double()
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return generator, classifier(4).double()


def test_gradients_are_those_of_the_whole():
    generator, model = smooth_model()
    inputs = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(PurifiedClassifier(generator, model), inputs)
    bounded = WassersteinPurifier(model, ThreatModel(eps=0.1, bounds=(-9, 9), mean=0.5, std=0.5), generator=generator)
    assert torch.autograd.gradcheck(bounded.double().purified, inputs)


def test_bpda_differentiates_the_classifier_at_the_purified_point():
    generator, model = smooth_model()
    inputs = torch.rand(3, 4, dtype=torch.float64).requires_grad_()
    point = generator(inputs).detach().requires_grad_()
    model(point)[:, 1].sum().backward()
    outputs = PurifiedClassifier(generator, model, bpda=True)(inputs)
    assert torch.equal(outputs, PurifiedClassifier(generator, model)(inputs))
    outputs[:, 1].sum().backward()
    assert torch.equal(inputs.grad, point.grad)
    assert all(parameter.grad is None for parameter in generator.parameters())


class Rounding(nn.Module):
    def forward(self, inputs):
        return (inputs * 8).round() / 8


def test_bpda_attacks_what_has_no_gradient(trained):
    _, clean, labels = trained
    model = trained_classifier().eval()
    assert robust(PurifiedClassifier(Rounding(), model), clean, labels) > 0.5
    assert robust(PurifiedClassifier(Rounding(), model, bpda=True), clean, labels) < 0.1


def test_autoattack_takes_it_as_any_model(trained):
    purifiers, clean, labels = trained
    model = PurifiedClassifier(purifiers[True], trained_classifier())
    assert not any("critic" in key or key.count("classifier") > 1 for key in model.state_dict())
    adversarial = AutoAttack(THREAT, steps=2, queries=5)(model, clean[:10], labels[:10])
    assert (adversarial - clean[:10]).abs().max() <= 0.2 + 1e-6


@pytest.mark.parametrize("through", [True, False])
def test_the_classifier_and_the_random_state_stay_as_they_were(through):
    model = Nasty(64, classes=10)
    before = Snapshot(model)
    generator = ResidualGenerator(64)
    weights = copy.deepcopy(generator.state_dict())
    fitted(purifier_of(model, generator=generator, through=through), loader(), num_sanity_val_steps=0)
    before.check()
    assert any(not torch.equal(value, weights[key]) for key, value in generator.state_dict().items())


@pytest.mark.parametrize("fail_at", [2, 5])
def test_the_classifier_stays_as_it_was_after_a_failure(fail_at):
    model = Nasty(
        64, classes=10, fail_at=fail_at
    )  # the fifth forward pass is that of the loss, the others the attack's
    before = Snapshot(model)
    with pytest.raises((RuntimeError, ValueError), match="nasty failure"):
        fitted(purifier_of(model, attack=PGD(THREAT, steps=4)))
    before.check()


def test_a_resumed_run_continues_exactly(tmp_path):
    def state(purifier, trainer):
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        return plain(saved["wasserstein_purifier"]), plain(saved["state_dict"]), plain(saved["optimizer_states"])

    whole = purifier_of()
    expected = state(whole, fitted(whole, max_epochs=2))
    half = purifier_of()
    fitted(half, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = purifier_of()
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert state(resumed, trainer) == expected
    assert expected[0]["critic"]["batches"] == 4


def test_the_seed_decides_the_noise():
    def weights(seed):
        purifier = purifier_of(seed=seed)
        fitted(purifier)
        return plain(purifier.purified.purifier.state_dict())

    assert weights(0) == weights(0) != weights(1)


def test_noise_differs_by_seed_epoch_batch_and_rank(monkeypatch):
    draws = []

    class Drawing(PGD):
        def perturb(self, problem):
            draws.append(torch.rand((), generator=problem.generator).item())
            return problem.data

    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(WassersteinPurifier, "global_rank", rank, raising=False)
        fitted(purifier_of(attack=Drawing(THREAT), seed=seed), max_epochs=2)
    assert len(set(draws)) == len(draws) == 3 * 2 * 2


class InDataUnits(nn.Module):
    """A generator that does the same whatever units its inputs have."""

    def __init__(self, threat):
        super().__init__()
        self.threat, self.inner = threat, ResidualGenerator(64)

    def forward(self, inputs):
        return self.threat.to_model(self.inner(self.threat.to_data(inputs)))


def test_normalised_inputs_make_no_difference():
    logged = []
    for threat in (THREAT, ThreatModel(eps=0.2, mean=0.3, std=0.25)):
        plain_model = trained_classifier().eval()
        model = nn.Sequential(InUnits(threat), plain_model)
        purifier = purifier_of(model, threat, generator=InDataUnits(threat))
        trainer = fitted(purifier, loader(96, change=threat.to_model))
        logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        purified = threat.to_data(purifier(threat.to_model(torch.rand(8, 1, 8, 8) * 2 - 0.5)))
        assert purified.min() >= -1e-6
        assert purified.max() <= 1 + 1e-6
    assert logged[0] == pytest.approx(logged[1], rel=0.02)


class InUnits(nn.Module):
    def __init__(self, threat):
        super().__init__()
        self.threat = threat

    def forward(self, inputs):
        return self.threat.to_data(inputs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    purifier = purifier_of()
    trainer = quiet_trainer(precision=precision)
    trainer.fit(purifier, *digits_loaders(train_size=64, val_size=32))
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert {"train/critic_distance", "val/robust_acc"} <= trainer.callback_metrics.keys()


def test_validation_goes_through_as_the_monitor_does(trained):
    purifier = purifier_of(generator=trained[0][True].purified.purifier)
    monitor = RobustnessMonitor(THREAT, {"pgd": PGD(THREAT, steps=3)}, model="purified", name="monitor")
    validation = digits_loaders()[1]
    values = quiet_trainer(callbacks=[monitor]).validate(purifier, validation, verbose=False)[0]
    for key in ("clean_acc", "robust_acc"):
        assert values[f"val/{key}"] == pytest.approx(values[f"val/monitor/{key}"])
    assert 0.1 < values["val/robust_acc"] < values["val/clean_acc"]
    tested = quiet_trainer().test(purifier, validation, verbose=False)[0]
    assert tested["test/robust_acc"] == values["val/robust_acc"]


class Rows(L.Callback):
    """The metrics of every step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def test_the_critic_never_claims_more_than_the_paired_distance():
    steps = Rows()
    fitted(purifier_of(critic=CriticDiscrepancy(lr=0.2)), loader(256), callbacks=[steps])
    assert len(steps.rows) == 8
    for row in steps.rows:
        assert row["train/critic_gap"] <= row["train/reconstruction"] + 1e-5
    assert steps.rows[-1]["train/critic_gap"] > 0.1


@pytest.mark.parametrize("dropped", PARTS)
def test_a_weight_of_zero_drops_the_term(dropped):
    steps = Rows()
    weights = {f"{name}_weight": 0.0 if name == dropped else 2.0 for name in PARTS}
    fitted(purifier_of(**weights), loader(32), callbacks=[steps])
    (row,) = steps.rows
    assert ("train/critic_gap" in row) == (dropped != "critic")
    if dropped == "critic":
        assert row["train/loss"] == pytest.approx(2 * row["train/task_loss"] + 2 * row["train/reconstruction"])
        fitted(purifier_of(**weights), loader(1))  # without a critic one sample will do


class Other(nn.Module):
    """A generator, or a classifier, that returns what a function makes of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.function(inputs * self.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"generator": Other(lambda x: x[:, :, 1:])}, ValueError, "same shape as it got, .*1, 8, 8.*1, 7, 8"),
        ({"generator": Other(lambda x: (x, x))}, TypeError, "must return a tensor .* got a tuple"),
        ({"generator": ResidualGenerator(65)}, ValueError, r"generator fails on inputs of shape \(32, 1, 8, 8\)"),
        ({"generator": Other(lambda x: x / 0), "critic_weight": 0.0}, FloatingPointError, "reconstruction = nan"),
        ({"model": Other(lambda x: [x])}, TypeError, "not logits but a list"),
        ({"model": Other(lambda x: x.flatten(1)[:, :10].softmax(1))}, ValueError, "look like probabilities"),
        ({"model": Other(lambda x: x.flatten(1)[:, :3])}, ValueError, "labels must lie in 0..2"),
        ({"train": loader(1)}, ValueError, "two samples or more on each side, got 1"),
        ({"train": loader(change=lambda x: x * torch.nan)}, ValueError, "NaN or infinite"),
        ({"train": loader(change=lambda x: x * 255)}, ValueError, "outside the threat model's bounds"),
    ],
)
def test_errors_in_training(options, error, message):
    purifier = purifier_of(options.pop("model", None), **{k: v for k, v in options.items() if k != "train"})
    weights = plain(purifier.state_dict())
    with pytest.raises(error, match=message):
        fitted(purifier, options.get("train"))
    assert plain(purifier.state_dict()) == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_weight": -1.0}, "task_weight must be finite and not negative, got -1"),
        ({"critic_weight": float("nan")}, "critic_weight must be finite"),
        ({"critic_weight": 0.0, "reconstruction_weight": 0, "task_weight": 0}, "are all 0"),
        ({"attack": "pgdd"}, "There is no attack 'pgdd'. Did you mean 'pgd'"),
        ({"attack": PGD(ThreatModel(eps=0.1))}, "attack was made for"),
        ({"evaluation": "gibbs-noise"}, "training only"),
        ({"model": nn.Sequential(nn.LSTM(8, 8)), "generator": None}, "Sequential does not begin .* give generator="),
    ],
)
def test_errors_of_settings(options, message):
    with pytest.raises(ValueError, match=message):
        purifier_of(**options)


def test_a_generator_is_made_for_the_classifier():
    images = torch.rand(2, 3, 9, 7)
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 7 * 5, 2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 7, 2))
    for model in (convolutional, flat):
        purifier = WassersteinPurifier(model, THREAT)
        assert torch.equal(purifier(images), images)  # before training it is the identity


@pytest.mark.parametrize("options", [{"shape": ()}, {"shape": 0}, {"shape": 4, "width": 0}, {"shape": 4, "depth": 0}])
def test_errors_of_generators(options):
    with pytest.raises(ValueError, match="at least"):
        ResidualGenerator(**options)

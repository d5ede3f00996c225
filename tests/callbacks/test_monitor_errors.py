"""Bad input to RobustnessMonitor and AdversarialExampleLogger says what to do, as early as it can."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import AdversarialExampleLogger, RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import FGSM, PGD, get_attack

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)

CONSTRUCTION = {
    "unbounded": (["n-fgsm"], {}, ValueError, r"'n-fgsm' leaves the threat model's ball.*training only.*'pgd'"),
    "unbounded-object": ([get_attack("n-fgsm", THREAT)], {}, ValueError, "leaves the threat model's ball"),
    "other-threat": ([PGD(THREAT.with_eps(0.2))], {}, ValueError, r"'pgd' was made for .*eps=0\.2.*threat=.*eps=0\.1"),
    "duplicate": (["pgd", PGD(THREAT, steps=20)], {}, ValueError, "Two attacks are called 'pgd'.*mapping"),
    "empty": ([], {}, ValueError, "attacks= is empty.*'pgd'"),
    "string": ("pgd", {}, ValueError, r"sequence or a mapping.*attacks=\['pgd'\]"),
    "single-attack": (FGSM(THREAT), {}, ValueError, r"sequence or a mapping.*attacks=\[FGSM\("),
    "unknown": (["autoatack"], {}, ValueError, "no attack 'autoatack'.*Did you mean 'autoattack'"),
    "not-an-attack": ([lambda model, x, y: x], {}, TypeError, "names and Attack objects, got a function"),
    "attack-class": ([PGD], {}, TypeError, "names and Attack objects"),
    "reserved-name": ({"clean": "pgd"}, {}, ValueError, "'clean' or 'robust'"),
    "no-batches": (["pgd"], {"max_batches": 0}, ValueError, "max_batches must be at least 1, or None.*got 0"),
    "no-epochs": (["pgd"], {"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1, got 0"),
    "no-radii": (["pgd"], {"epsilons": []}, ValueError, "at least one larger budget"),
    "only-zero": (["pgd"], {"epsilons": [0]}, ValueError, "at least one larger budget"),
    "negative-radius": (["pgd"], {"epsilons": [-0.1, 0.1]}, ValueError, "increase strictly"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    attacks, options, error, message = CONSTRUCTION[case]
    with pytest.raises(error, match=message):
        RobustnessMonitor(THREAT, attacks, **options)


@pytest.mark.parametrize(
    ("attack", "options", "error", "message"),
    [
        ("n-fgsm", {}, ValueError, "leaves the threat model's ball"),
        ("pgdd", {}, ValueError, "Did you mean 'pgd'"),
        (PGD(THREAT.with_eps(0.2)), {}, ValueError, "was made for"),
        ("pgd", {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ("pgd", {"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1"),
    ],
)
def test_construction_of_the_example_logger(attack, options, error, message):
    with pytest.raises(error, match=message):
        AdversarialExampleLogger(THREAT, attack, **options)


class NormalisedDigits(DigitsClassifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 0.3) / 0.4, batch[1]


class Probabilities(DigitsClassifier):
    def forward(self, x):
        return super().forward(x).softmax(1)


def loader(collate, size=16) -> DataLoader:
    images, labels = digits()
    return DataLoader(
        TensorDataset(images[:size], labels[:size]),
        size,
        collate_fn=lambda it: collate(*map(torch.stack, zip(*it, strict=True))),
    )


class Indifferent(DigitsClassifier):
    """Has a validation step that takes any batch."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


EVALUATION = {
    "no-labels": (lambda x, y: {"image": x, "digit": y}, Indifferent, {}, ValueError, "No labels.*'image', 'digit'.*labels="),
    "no-inputs": (lambda x, y: {"pixels": x, "depths": x, "label": y}, Indifferent, {}, ValueError, "No inputs.*'pixels', 'depths', 'label'.*inputs="),
    "one-tensor": (lambda x, y: x, Indifferent, {}, ValueError, r"No labels.*one tensor of shape \(16, 1, 8, 8\)"),
    "wrong-key": (lambda x, y: {"image": x, "label": y}, Indifferent, {"labels": "digit"}, ValueError, "labels='digit' names nothing.*'image', 'label'"),
    "nested": (lambda x, y: ([x, x], y), Indifferent, {}, ValueError, r"(?s)cannot be attacked.*training_step failed.*inputs="),
    "normalised": (lambda x, y: (x, y), NormalisedDigits, {}, ValueError, r"mean and std are not set.*ThreatModel\(mean="),
    "probabilities": (lambda x, y: (x, y), Probabilities, {}, ValueError, "look like probabilities"),
    "no-forward": (lambda x, y: (x, y), HeadlessDigitsClassifier, {"through": "model"}, ValueError, "has no forward.*model=.*'net'"),
    "unknown-model": (lambda x, y: (x, y), DigitsClassifier, {"model": "nett"}, ValueError, "model=.*'nett'.*Did you mean 'net'"),
    "unknown-layer": (lambda x, y: (x, y), DigitsClassifier, {"features": "net.hiden"}, ValueError, "'net.hiden'.*Did you mean 'net.hidden'"),
    "wrong-labels": (lambda x, y: (x, y + 5), Indifferent, {}, ValueError, r"labels run from .* to 14.*10 classes"),
    "integer-images": (lambda x, y: ((x * 255).byte(), y), Indifferent, {}, TypeError, r"torch.uint8.*perturb=.*x\.float\(\) / 255"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation(case):
    collate, module, options, error, message = EVALUATION[case]
    monitor = RobustnessMonitor(THREAT, ["fgsm"], **options)
    with pytest.raises(error, match=message):
        quiet_trainer(callbacks=[monitor]).validate(module(), loader(collate), verbose=False)


@pytest.mark.parametrize("options", [{"model": "nett"}, {"features": "net.hiden"}])
def test_a_path_that_does_not_exist_is_an_error_before_training(options):
    class Untrained(DigitsClassifier):
        def on_train_start(self):
            raise AssertionError("training started")

    with pytest.raises(ValueError, match="Did you mean"):
        quiet_trainer(callbacks=[RobustnessMonitor(THREAT, **options)]).fit(Untrained(), *digits_loaders())


@pytest.mark.parametrize("callback", [RobustnessMonitor, AdversarialExampleLogger])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FSDPStrategy", "FSDP1 keeps the parameters in flat tensors.*Use FSDP2.*strategy='ddp'"),
        ("DeepSpeedStrategy", "DeepSpeed's engine takes gradients only in.*Use FSDP2.*strategy='ddp'"),
        ("ModelParallelStrategy", r"(tensor_parallel_size=2.*share each sample|runs the model on one rank only)"),
    ],
)
def test_sharded_strategies_are_refused(callback, name, reason, monkeypatch):
    trainer = quiet_trainer()
    strategy = type("Custom", (type(name, (), {}),), {})()  # also a subclass
    strategy.device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    monkeypatch.setattr(type(trainer), "strategy", strategy)
    with pytest.raises(MisconfigurationException, match=rf"{callback.__name__} .*{reason}"):
        callback(THREAT).setup(trainer, trained_classifier(), "validate")


def test_two_monitors_without_names_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="state_key"):
        quiet_trainer(callbacks=[RobustnessMonitor(THREAT), RobustnessMonitor(THREAT)])

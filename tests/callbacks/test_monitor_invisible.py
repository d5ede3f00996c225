"""Watching changes nothing: training under the monitors is the same, bit for bit, as without them."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer, trained_classifier
from torch import nn

from lightning_wdefense import AdversarialExampleLogger, DetectionMonitor, RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import get_attack
from lightning_wdefense.detection import DETECTORS

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)


def monitors() -> list[L.Callback]:
    noisy = {"fgsm": "fgsm", "pgd": "pgd", "square": get_attack("square", THREAT, queries=10)}
    return [
        RobustnessMonitor(THREAT, noisy, epsilons=[0.05]),
        DetectionMonitor(THREAT, detectors=list(DETECTORS)[:-1]),  # all but the critic
        AdversarialExampleLogger(THREAT, samples=2),
    ]


class Restless(DigitsClassifier):
    """Has everything that watching could disturb: dropout, BatchNorm, a frozen backbone in eval mode, draws of its own."""

    def __init__(self, freeze: bool = False) -> None:
        super().__init__(batch_norm=True)
        self.net = nn.Sequential(*self.net[:-1], nn.Dropout(0.2), self.net.head)
        self.freeze = freeze
        if freeze:
            self.net[:2].requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freeze:
            self.net[1].eval()
        return self

    def training_step(self, batch, batch_idx):
        noise = torch.randn(1).item() + np.random.rand() + random.random()
        return super().training_step(batch, batch_idx) * (1 + 0.01 * noise)


class Seen(L.Callback):
    """The modes and random states at the start of each training epoch, after the validation before it."""

    def __init__(self) -> None:
        self.states = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        modes = [module.training for module in pl_module.modules()]
        draws = [torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(), hash(random.getstate())]
        self.states.append((modes, draws))


@pytest.mark.parametrize("freeze", [False, True])
def test_training_is_the_same_bit_for_bit(tmp_path, freeze):
    def train(callbacks):
        L.seed_everything(3, verbose=False)
        module, seen = Restless(freeze), Seen()
        trainer = quiet_trainer(
            callbacks=[*callbacks, seen],
            max_epochs=2,
            val_check_interval=0.5,
            limit_train_batches=4,
            accumulate_grad_batches=2,
            logger=TensorBoardLogger(tmp_path),
        )
        trainer.fit(module, *digits_loaders(val_size=32, batch_size=16))
        return module.state_dict(), seen.states

    plain, states_plain = train([])
    watched, states_watched = train(monitors())
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    assert states_watched == states_plain


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_leaves_the_module_as_it_was(tmp_path, stage):
    class Marked(DigitsClassifier):
        def on_validation_start(self):  # Lightning itself sets the gradients to None before
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)

        on_test_start = on_validation_start

    module = Marked(batch_norm=True)
    module.load_state_dict(trained_classifier(batch_norm=True).state_dict())
    module.net.norm.train()
    module.net.act.eval()
    module.net.conv.requires_grad_(False)
    modes = {name: it.training for name, it in module.named_modules()}
    flags = {name: it.requires_grad for name, it in module.named_parameters()}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    hooks = [dict(it._forward_hooks) | dict(it._forward_pre_hooks) for it in module.modules()]

    trainer = quiet_trainer(callbacks=monitors(), logger=TensorBoardLogger(tmp_path))
    getattr(trainer, stage)(module, digits_loaders(val_size=64)[1], verbose=False)

    assert {name: it.training for name, it in module.named_modules()} == modes
    assert {name: it.requires_grad for name, it in module.named_parameters()} == flags
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(it.grad, torch.ones_like(it)) for it in module.parameters())
    assert [dict(it._forward_hooks) | dict(it._forward_pre_hooks) for it in module.modules()] == hooks


def test_an_attack_that_fails_leaves_the_module_as_it_was():
    class Failing(DigitsClassifier):
        fail = False

        def forward(self, x):
            if self.fail and x.requires_grad:
                raise KeyboardInterrupt
            return super().forward(x)

    module = Failing(batch_norm=True)
    monitor = RobustnessMonitor(THREAT)
    module.fail = True
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(callbacks=[monitor]).validate(module, digits_loaders()[1], verbose=False)
    assert module.net.norm.num_batches_tracked == 0
    # The same monitor still works.
    module.fail = False
    values = quiet_trainer(callbacks=[monitor]).validate(module, digits_loaders()[1], verbose=False)[0]
    assert "val/robust_acc" in values

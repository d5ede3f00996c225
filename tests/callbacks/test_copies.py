"""Copies of a module in training are plain modules, and the module itself stays defended."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer
from torch import nn

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.modules.attachments import Attachment
from lightning_wdefense.modules.recording import ForwardRecorder

THREAT = ThreatModel(eps=0.2)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def saved(module):
    torch.save(module, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


def assert_plain(module):
    for child in module.modules():
        held = [*child.__dict__.values(), *(hook for kind in HOOKS for hook in getattr(child, kind).values())]
        assert not any(isinstance(it, Attachment) for it in held)
        assert "__getstate__" not in child.__dict__
    assert "training_step" not in module.__dict__
    assert b"lightning_wdefense" not in pickle.dumps(module)  # it is loaded without us


class User(L.Callback):
    """Copies the module wherever it is called."""

    def __init__(self, make):
        self.make, self.copies = make, []

    def keep(self, trainer, pl_module, *args):
        self.copies.append(self.make(pl_module))

    on_fit_start = on_train_start = on_train_batch_end = on_validation_batch_end = on_train_epoch_end = keep


def defend(**options):
    return WassersteinDefense("sat-features", threat=THREAT, warmup_epochs=0, **options)


def fit(module, *callbacks, **options):
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options}
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, *digits_loaders(batch_size=8, shuffle=False))
    return module


def weights(module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_between_steps(make):
    L.seed_everything(0, verbose=False)
    expected = fit(DigitsClassifier(), defend())
    L.seed_everything(0, verbose=False)
    module = fit(DigitsClassifier(), defend(), RobustnessMonitor(THREAT, ["fgsm"]), user := User(make))
    assert torch.equal(weights(module), weights(expected))  # the original stayed defended
    assert len(user.copies) == 6
    assert_plain(module)
    for twin in user.copies:
        assert_plain(twin)
    before, original = weights(twin), weights(module)
    fit(twin)
    assert not torch.equal(weights(twin), before)
    assert torch.equal(weights(module), original)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("where", ["step", "forward"])
def test_inside_of_steps(make, where, monkeypatch):
    """As for a teacher of one's own; in ``forward`` also while our attacks and monitors run."""

    class Teaching(DigitsClassifier):
        def keep(self, at):
            if at == where and not self.__dict__.get("busy"):
                self.__dict__["busy"] = True
                copies.append(make(self))
                del self.__dict__["busy"]

        def training_step(self, batch, batch_idx):
            self.keep("step")
            return super().training_step(batch, batch_idx)

        def forward(self, x):
            self.keep("forward")
            return super().forward(x)

    # Found by pickle under this name.
    Teaching.__qualname__ = "Teaching"
    monkeypatch.setattr(sys.modules[__name__], "Teaching", Teaching, raising=False)
    copies: list[nn.Module] = []
    fit(Teaching(), defend(), RobustnessMonitor(THREAT, ["fgsm"]))
    assert copies
    for twin in copies:
        assert_plain(twin)


def test_a_shallow_copy():
    module = DigitsClassifier()
    recorder = ForwardRecorder(module)
    recorder.attach(digits()[0][:2])
    twin = copy.copy(module)
    assert not twin._forward_hooks
    assert module._forward_hooks
    assert "__getstate__" not in twin.__dict__
    recorder.detach()
    assert_plain(module)


class OwnState(DigitsClassifier):
    def __getstate__(self):
        return super().__getstate__() | {"kept": "mine"}


class OwnDeepcopy(DigitsClassifier):
    def __deepcopy__(self, memo):
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(
            copy.deepcopy({key: value for key, value in vars(self).items() if key != "_trainer"}, memo)
        )
        twin._trainer = None
        return twin


class Forgetful(DigitsClassifier):
    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy({key: value for key, value in vars(self).items() if key != "_trainer"}))
        return twin


def test_a_class_with_a_state_of_its_own():
    fit(OwnState(), defend(), user := User(copy.deepcopy))
    assert all(twin.kept == "mine" for twin in user.copies)
    assert_plain(user.copies[-1])


def test_a_class_with_a_deepcopy_of_its_own():
    """Attributes of ours become the copy's own, which trains, and whose copies are plain."""
    module = fit(OwnDeepcopy(), defend(), user := User(copy.deepcopy))
    twin = user.copies[-1]
    assert twin.training_step.__self__ is twin
    before, original = weights(twin), weights(module)
    fit(twin)
    assert not torch.equal(weights(twin), before)
    assert torch.equal(weights(module), original)
    assert torch.equal(weights(pickle.loads(pickle.dumps(twin))), weights(twin))


def test_a_deepcopy_that_loses_the_module_is_told():
    with pytest.raises(pickle.PicklingError, match=r"Forgetful copies its __dict__.*memo\[id\(self\)\]"):
        fit(Forgetful(), defend(), User(copy.deepcopy))


def test_an_instances_own_getstate_comes_back():
    module = DigitsClassifier()
    own = module.__dict__["__getstate__"] = lambda: {"only": "this"}
    recorder = ForwardRecorder(module)
    recorder.attach(digits()[0][:2])
    assert module.__reduce_ex__(2)[2] == {"only": "this"}
    recorder.detach()
    assert module.__dict__["__getstate__"] is own


def test_lightnings_own_averages():
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=0.0)
    fit(DigitsClassifier(), defend(), averaging)
    assert_plain(averaging._average_model)
    if hasattr(callbacks, "WeightAveraging"):
        averages = []

        class Averaging(callbacks.WeightAveraging):
            def on_train_end(self, trainer, pl_module):
                averages.append(self._average_model.module)
                super().on_train_end(trainer, pl_module)

        fit(DigitsClassifier(), defend(), Averaging())
        assert_plain(averages[0])


def test_a_compiled_modules_copy():
    module = DigitsClassifier()
    module.net = torch.compile(module.net, backend="eager")
    fit(module, defend(model="net"), user := User(lambda it: copy.deepcopy(it.net._orig_mod)))
    for twin in user.copies:
        assert not any(child._forward_hooks or child._forward_pre_hooks for child in twin.modules())


class Mixed(WassersteinDefenseMixin, DigitsClassifier):
    def configure_defense(self):
        return Recipe.named("critic", THREAT, warmup_epochs=1)

    def training_step(self, batch, batch_idx):
        return self.defend(*batch).loss


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_mixins_copy_goes_on_from_what_was_learned(make):
    module = fit(Mixed(), user := User(make))
    twin, learned = make(module), plain(module.defense.state_dict())
    assert all(not isinstance(it, Attachment) for copied in (twin, *user.copies) for it in vars(copied).values())
    assert learned["batches"] == 2
    assert plain(twin.defense.state_dict()) == learned
    assert twin.defense.model is twin
    fit(twin)
    assert plain(module.defense.state_dict()) == learned
    assert twin.defense.batches == 4


@pytest.mark.parametrize("make", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_our_callbacks_are_copied_with_what_they_know(make):
    class Copy(L.Callback):
        def keep(self, trainer, pl_module, *args):
            copies.append([make(it) for it in (defense, monitor)])

        on_train_batch_end = on_validation_batch_end = on_train_epoch_end = keep

    defense, monitor, copies = defend(), RobustnessMonitor(THREAT, ["fgsm"]), []
    assert make(defense).recipe == defense.recipe
    fit(DigitsClassifier(), defense, monitor, Copy())
    assert [twin.state_dict()["batches"] for twin, _ in copies] == [1, 2, 2, 2]
    assert copies[-1][1].state_dict() == monitor.state_dict()
    assert make(defense).state_dict() == defense.state_dict()
    for twin, watcher in copies[-1:]:
        fit(module := DigitsClassifier(), twin, watcher)
        assert_plain(module)

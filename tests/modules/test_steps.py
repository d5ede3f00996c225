"""A step called as a function leaves no trace, and is the same function at each call."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter, deque

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.lightning_modules import digits, digits_loaders, quiet_trainer
from torch import nn
from torchmetrics import Accuracy, F1Score, MeanMetric, MetricCollection

from lightning_wdefense.modules.steps import Step, unwrapped_step

pytestmark = pytest.mark.filterwarnings("ignore")


class Meter:
    """What users keep averages with."""

    def __init__(self):
        self.sum, self.values = 0.0, []

    def update(self, value):
        self.sum += value
        self.values.append(value)


class Child(L.LightningModule):
    def forward(self, x):
        return x


class Nasty(L.LightningModule):
    """Does in its step whatever users do there."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 10)
        )
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.child = Child()
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.both = MetricCollection(
            {"acc": Accuracy("multiclass", num_classes=10), "f1": F1Score("multiclass", num_classes=10)}
        )
        self.unregistered = {"mean": [MeanMetric()]}
        self.register_buffer("seen", torch.zeros(()))
        self.plain, self.array = torch.zeros(3), np.zeros(3)
        self.outputs, self.by_key, self.ids, self.last = [], {}, set(), deque(maxlen=2)
        self.counts, self.meter, self.steps = Counter(), Meter(), 0
        self.torch_noise, self.numpy_noise = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.python_noise, self.fail, self.copies = random.Random(1), False, []

    def log(self, name, value, **options):
        super().log(f"mine/{name}", value, **options)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.rand(()) + np.random.rand() + random.random()
        noise = (
            noise + torch.rand((), generator=self.torch_noise) + self.numpy_noise.random() + self.python_noise.random()
        )
        logits = self.net(self.child(x) + 0.01 * noise)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"a": loss, "b": 2 * loss})
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log_dict(self.both(logits, y))
        self.unregistered["mean"][0].update(loss.detach())
        for logger in self.loggers:
            logger.log_metrics({"direct": loss.item()}, step=0)
        if self.loggers:
            getattr(self.loggers[-1].experiment, "add_scalar", print)("direct", loss.item(), 0)
        with torch.no_grad():
            self.seen += 1
            self.plain += 1
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        self.array += 1
        self.outputs.append(logits.detach())
        self.by_key.setdefault("losses", []).append(loss.item())
        self.ids.add(len(self.ids))
        self.last.append(loss.detach())
        self.counts["steps"] += 1
        self.meter.update(loss.item())
        self.steps += 1
        self.brand_new = loss.detach()
        if self._trainer is not None and self._trainer.training:
            self.lr_schedulers().step()
            assert self.optimizers().param_groups
            if not self.training:  # as the rehearsals run it, and only they
                self.optimizers().step()
        if self.fail:
            raise RuntimeError("in the middle")
        if self.copies is None:
            copy.deepcopy(self)
            pickle.dumps(self)
        return {"loss": loss, "more": logits}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def state_of(module):
    """Everything that the module holds, by value."""
    metrics = [each for each in module.modules() if hasattr(each, "metric_state")] + module.unregistered["mean"]
    return {
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "gradients": [None if each.grad is None else each.grad.clone() for each in module.parameters()],
        "flags": [each.requires_grad for each in module.parameters()],
        "metrics": [
            (
                each._update_count,
                each._computed,
                each._forward_cache,
                {k: copy.copy(v) for k, v in each.metric_state.items()},
            )
            for each in metrics
            if hasattr(each, "_update_count")
        ],
        "modes": [each.training for each in module.modules()],
        "plain": [module.plain.clone(), torch.from_numpy(module.array.copy()), module.steps, module.meter.sum],
        "containers": [
            list(module.outputs),
            {key: list(value) for key, value in module.by_key.items()},
            set(module.ids),
            list(module.last),
            dict(module.counts),
            list(module.meter.values),
        ],
        "noise": [
            module.torch_noise.get_state(),
            str(module.numpy_noise.bit_generator.state),
            module.python_noise.getstate(),
            torch.get_rng_state(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        ],
        "names": sorted(vars(module)),
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one, other):
    for key, value in one.items():
        assert same(value, other[key]), key


def batch():
    images, labels = digits()
    return images[:32], labels[:32]


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = Nasty()
    for _ in range(2):  # has a past
        module.training_step(batch(), 0)
    module.net[1].weight.grad = torch.ones_like(module.net[1].weight)
    module.net[2].eval()
    return module


def step_of(module):
    return Step(module, unwrapped_step(module, "training_step"), "training_step", (0,))


@pytest.mark.parametrize("noise", ["off", "training", "own"])
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_trace_and_one_function(module, noise, under):
    before, step = state_of(module), step_of(module)
    with under(), step.repeatable(torch.device("cpu"), noise):
        losses = [step.loss(batch()).item() for _ in range(4)]
        x = batch()[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(step.loss((x, batch()[1])), x)
    assert_same(before, state_of(module))
    assert slope.abs().max() > 0
    if noise != "own":  # there the statistics of BatchNorm and dropout are a part of the module
        assert len(set(losses)) == 1
    else:
        assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("returned", [lambda losses: losses, lambda losses: {"loss": losses.mean()}])
@pytest.mark.parametrize("name", ["training_step", "validation_step"])
def test_the_loss_is_a_scalar(module, name, returned):
    """Of a training step the mean of what it returns; another's vector is predictions, and what it logs is its loss."""

    def function(batch):
        losses = module.net(batch[0]).square().flatten(1).mean(1)
        if name == "validation_step":
            module.log("val_loss", losses.sum().reshape(1))
        return returned(losses)

    step = Step(module, function, name)
    with step.repeatable(torch.device("cpu")):
        expected = module.net(batch()[0]).square().mean()
        loss = step.loss(batch())
        if name == "validation_step" and not isinstance(step(batch()), dict):
            expected = expected * len(batch()[0])
    assert loss.ndim == 0
    assert loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_no_trace_of_a_step_that_fails(module):
    module.fail = True
    before, step = state_of(module), step_of(module)
    with pytest.raises(RuntimeError, match="in the middle"), step.repeatable(torch.device("cpu")):
        step(batch())
    assert_same(before, state_of(module))


class Backward(Nasty):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        loss.backward(retain_graph=True)
        return loss


def goes_backward(module):
    module.__class__ = Backward


def copies_itself(module):
    module.copies = None


@pytest.mark.parametrize("prepare", [goes_backward, copies_itself])
def test_no_trace_of_what_a_step_does_with_the_module(module, prepare):
    prepare(module)
    before, step = state_of(module), step_of(module)
    with step.repeatable(torch.device("cpu")):
        step(batch())
    assert_same(before, state_of(module))


def test_under_autocast(module):
    before, step = state_of(module), step_of(module)
    with torch.autocast("cpu", torch.bfloat16), step.repeatable(torch.device("cpu")):
        assert step(batch())["more"].dtype == torch.bfloat16
        assert step.loss(batch()) == step.loss(batch())
    assert_same(before, state_of(module))


class Calling(L.Callback):
    """Calls the step in every training batch, or not at all."""

    def __init__(self, times):
        self.times, self.bars = times, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = step_of(pl_module)
        if self.times:
            with step.repeatable(pl_module.device):
                for _ in range(self.times):
                    step(batch)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.bars.append({key: float(value) for key, value in trainer.progress_bar_metrics.items()})


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_under_a_trainer_nothing_gets_out(logger, tmp_path):
    def run(times):
        L.seed_everything(0, verbose=False)
        folder = tmp_path / str(times)
        callback, module = Calling(times), Nasty()
        options = {"max_epochs": 2, "limit_train_batches": 3, "log_every_n_steps": 1, "logger": logger(folder)}
        trainer = quiet_trainer(callbacks=[callback], **options)
        trainer.fit(module, digits_loaders(shuffle=False)[0])
        files = sorted(folder.rglob("metrics.csv")) + sorted(folder.rglob("events*"))
        written = [file.read_text() if file.suffix == ".csv" else len(file.read_bytes()) for file in files]
        logged = {**trainer.callback_metrics, **trainer.logged_metrics}
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        return state_of(module), {"logged": logged, "bars": callback.bars, "rates": rates, "written": written}

    plain, called = run(0), run(3)
    assert plain[1]["written"]
    assert "mine/loss_epoch" in plain[1]["logged"]
    for one, other in zip(plain, called, strict=True):
        assert_same(one, other)


def test_the_other_branch_draws_as_the_users_own_call(module):
    from lightning_wdefense.modules.state.random_state import RandomState

    start, step = RandomState(torch.device("cpu")), step_of(module)
    module.net[3].p = 0.9
    masks = []
    module.net[3].register_forward_hook(lambda _, args, output: masks.append(output == 0))
    module.training_step(batch(), 0)
    now = torch.get_rng_state()
    count, shown = module.steps, len(module.outputs)
    with step.one_more_call(start) as call:
        call(batch())["loss"].backward()
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), now)
    assert (module.steps, len(module.outputs)) == (count, shown)
    assert module.net[1].weight.grad.abs().max() > 1  # parameters see it

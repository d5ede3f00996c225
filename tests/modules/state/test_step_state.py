"""What a step may move, and what a rehearsal of it puts back: whatever it logs, appends, draws, counts and moves."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.lightning_modules import digits, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall

from lightning_wdefense.modules.steps import Step, unwrapped_step

CPU = torch.device("cpu")


class Meter:
    """An average as half the repositories have it."""

    def __init__(self):
        self.total, self.count, self.seen = torch.zeros(()), 0, []

    def update(self, value, n=1):
        self.total += value
        self.count += n
        self.seen.append(float(value))


class CallableMeter(Meter):
    def __call__(self, value):
        self.update(value)


class SlottedMeter:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Child(L.LightningModule):
    """Counts for itself."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.mean = nn.Linear(16, 10), 0, MeanMetric()

    def forward(self, x):
        self.calls += 1
        out = self.net(x)
        self.mean.update(out.detach().mean())
        return out


class Nasty(L.LightningModule):
    """Does in its step all that a step should not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.child = Child()
        self.accuracy = MulticlassAccuracy(10)
        self.collection = MetricCollection(
            {
                name: kind(10)
                for name, kind in {"f": MulticlassF1Score, "p": MulticlassPrecision, "r": MulticlassRecall}.items()
            }
        )
        self.listed = [MulticlassAccuracy(10)]
        self.named = {
            "train": {"acc": MulticlassAccuracy(10)},
            "all": MetricCollection([MulticlassPrecision(10), MulticlassRecall(10)]),
        }
        self.register_buffer("seen", torch.zeros(()))
        self.ema = copy.deepcopy(self.stem[1]).requires_grad_(False)
        self.ema_state = {name: each.detach().clone() for name, each in self.stem[1].named_parameters()}
        self.ema_list = [each.detach().clone() for each in self.stem[1].parameters()]
        self.hidden = [copy.deepcopy(self.stem[1])]
        self.outputs, self.groups = [], defaultdict(list)
        self.bag, self.queue, self.counter = set(), deque(maxlen=3), Counter({1: 2})
        self.queue.extend([1, 2, 3])
        self.ordered = OrderedDict(a=1, b=2)
        self.histogram, self.nested = np.zeros(10), {"x": [np.ones(3)], "y": (np.ones(2), [])}
        self.meter, self.meters, self.callable = Meter(), {"loss": Meter()}, CallableMeter()
        self.slotted = SlottedMeter()
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.python = random.Random(1)
        self.steps, self.best, self.running = 0, float("inf"), torch.zeros(())
        self.cache = None
        self.overridden, self.fails = 0, False

    def log(self, name, value, *args, **kwargs):
        self.overridden += 1
        super().log(name, value, *args, **kwargs)

    def loss(self, batch):
        x, y = batch
        noise = torch.rand(1) + torch.rand(1, generator=self.generator) + float(self.python.random() + random.random())
        noise = noise + float(self.numpy_generator.random() + self.old.rand() + np.random.rand())
        out = self.child(self.stem(x + 0.01 * noise.to(x)))
        return F.cross_entropy(out.float(), y), out

    def training_step(self, batch, batch_idx):
        loss, out = self.loss(batch)
        labels, value = batch[1], loss.detach().float()
        with torch.no_grad():
            for mine, theirs in zip(self.ema.parameters(), self.stem[1].parameters(), strict=True):
                mine.mul_(0.9).add_(theirs, alpha=0.1)
            for name, theirs in self.stem[1].named_parameters():
                self.ema_state[name].mul_(0.9).add_(theirs, alpha=0.1).add_(0.01)
            for mine in [*self.ema_list, *self.hidden[0].parameters()]:
                mine.add_(0.5)
        self.steps += 1
        self.seen += 1
        self.running += value
        self.best = min(self.best, float(value))
        self.outputs.append(loss)
        self.groups[int(labels[0])].append(value)
        self.bag.add(self.steps)
        self.queue.append(self.steps)
        self.counter.update(labels.tolist())
        self.ordered.move_to_end("a")
        np.add.at(self.histogram, labels.numpy(), 1)
        self.nested["x"][0] += 1
        self.nested["y"][1].append(1)
        self.new_attribute = self.cache = out
        self.meter.update(value)
        self.meters["loss"].update(value)
        self.callable(value)
        self.slotted.count += 1
        predicted = out.detach().float()
        for metric in (self.accuracy, self.collection, self.listed[0], self.named["train"]["acc"], self.named["all"]):
            metric(predicted, labels)
        if self._trainer is not None:
            self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
            self.log("train/acc", self.accuracy, on_step=True, on_epoch=True)
            self.log("train/listed", self.listed[0].compute())
            self.log_dict({"a": value, "b": self.steps})
            self.log_dict(self.collection, on_epoch=True)
            for logger in self.loggers:
                logger.log_metrics({"direct": self.steps}, step=self.steps)
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_scalar("direct", self.steps, self.steps)
            optimizer = self.optimizers()
            assert optimizer.param_groups[0]["lr"] > 0
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            self.lr_schedulers().step()
        if self.fails:
            raise RuntimeError("in the middle")
        return {"loss": loss, "out": out}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def flat(value, seen=None):
    """All that is in a module, as plain data in one order; values, not identities."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return (
            "tensor",
            value.dtype,
            tuple(value.shape),
            value.requires_grad,
            value.detach().float().clone().numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.tobytes())
    if isinstance(value, (int, float, str, bool, bytes, type(None), complex)):
        return value
    if isinstance(value, torch.Generator):
        return ("generator", value.get_state().numpy().tobytes())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if id(value) in seen:
        return ("seen", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return (type(value).__name__, [(repr(key), flat(each, seen)) for key, each in value.items()])
    if isinstance(value, (list, tuple, deque)):
        return (type(value).__name__, [flat(each, seen) for each in value])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    if isinstance(value, SlottedMeter):
        return ("slotted", value.count)
    owners = ("torch", "torchmetrics", __name__.split(".")[0])
    ours = isinstance(value, nn.Module) or type(value).__module__.split(".")[0] in owners
    if ours and hasattr(value, "__dict__") and not isinstance(value, type):
        skipped = {"_trainer", "_fabric"}
        return (type(value).__name__, [(k, flat(v, seen)) for k, v in vars(value).items() if k not in skipped])
    return type(value).__name__


def randoms():
    return (torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(random.getstate()))


def same(before, after, path=""):
    """Where two flat things differ."""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and type(before) is type(after):
        if len(before) != len(after):
            return [f"{path}: {len(before)} entries, then {len(after)}"]
        return [
            each
            for i, (b, a) in enumerate(zip(before, after, strict=True))
            for each in same(b, a, f"{path}/{b[0] if isinstance(b, tuple) and b and isinstance(b[0], str) else i}")
        ]
    return [] if before == after and type(before) is type(after) else [path]


def batch_of(size=16):
    images, labels = digits()
    return images[:size].clone(), labels[:size].clone()


def step_of(module):
    return Step(module, unwrapped_step(module, "training_step"), "training_step", (0,))


@pytest.fixture
def nasty():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Nasty()
        batch = batch_of()
        module.training_step(batch, 0)  # so that nothing is empty
        module.outputs.clear()
        module.cache = module.new_attribute = None
        del module.new_attribute
    return module


@pytest.mark.parametrize("noise", ["off", "training", "own"])
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "autocast", "eval"])
def test_many_calls_leave_nothing(nasty, noise, mode):
    if mode == "eval":
        nasty.eval()
    if noise == "own":
        nasty.stem[4].p = 0.5
    before, drawn = flat(nasty), randoms()
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    batch, step, losses = batch_of(), step_of(nasty), []
    with contexts.get(mode, torch.enable_grad)(), step.repeatable(CPU, noise):
        for _ in range(4):
            x = batch[0].clone().requires_grad_()
            loss = step.loss((x, batch[1]))
            losses.append(float(loss))
            assert torch.autograd.grad(loss, x)[0].abs().sum() > 0
    assert len(set(losses)) == 1
    assert same(before, flat(nasty)) == []
    assert drawn == randoms()


def test_a_step_that_raises_leaves_nothing(nasty):
    nasty.fails = True
    before, drawn, step = flat(nasty), randoms(), step_of(nasty)
    with pytest.raises(RuntimeError, match="in the middle"), step.repeatable(CPU):
        step(batch_of())
    assert same(before, flat(nasty)) == []
    assert drawn == randoms()
    assert not step.ready


def test_a_call_that_raises_and_is_caught_inside_is_undone_by_the_next(nasty):
    step, before = step_of(nasty), flat(nasty)
    with step.repeatable(CPU):
        first = float(step.loss(batch_of()))
        for _ in range(2):
            with pytest.raises(TypeError):
                step((batch_of()[0], None))
        assert float(step.loss(batch_of())) == first
    assert same(before, flat(nasty)) == []


def test_once_more_draws_as_the_first_call_and_moves_only_buffers_and_random_state_of_the_first(nasty):
    from lightning_wdefense.modules.state.random_state import RandomState

    batch, step = batch_of(), step_of(nasty)
    start = RandomState(CPU)
    kept = copy.deepcopy(nasty)
    own = nasty.training_step(batch, 0)["loss"]
    for name in ("outputs", "cache", "new_attribute"):
        nasty.__dict__[name] = [] if name == "outputs" else None
    # generators held by the module have moved by the user's own call; put them back by hand to compare
    for mine, theirs in ((nasty.generator, kept.generator),):
        mine.set_state(theirs.get_state())
    nasty.numpy_generator.bit_generator.state = kept.numpy_generator.bit_generator.state
    nasty.old.set_state(kept.old.get_state())
    nasty.python.setstate(kept.python.getstate())
    before, drawn = flat(nasty), randoms()
    with step.one_more_call(start) as call:
        loss = call(batch)["loss"]
    assert torch.equal(own, loss)  # same masks, same draws
    assert drawn == randoms()
    moved = [each for each in same(before, flat(nasty))]
    assert moved, "batch norm has seen it"
    assert all("_buffers" in each or "stem" in each for each in moved), moved
    assert loss.requires_grad


@pytest.mark.parametrize("inside", [True, False])
def test_copies_and_pickles_in_the_step_are_plain(inside):
    class Copying(Nasty):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            self.outputs.clear()
            self.cache = self.new_attribute = None
            kept = (self.generator, self.hidden)
            self.generator = None
            made.append(copy.deepcopy(self))
            made_bytes.append(pickle.dumps(self.child))
            self.generator, self.hidden = kept
            return out

    made, made_bytes = [], []
    module = Copying()
    step = step_of(module)
    with step.repeatable(CPU):
        step(batch_of())
    assert "log" not in vars(made[0])
    assert "optimizers" not in vars(made[0].child)
    assert b"lightning_wdefense" not in made_bytes[0]
    assert pickle.loads(made_bytes[0])(torch.rand(2, 16)).shape == (2, 10)
    assert "log" not in vars(module)
    assert "__getstate__" not in vars(module)


def test_modes_that_a_step_leaves_behind_are_those_of_the_beginning_at_each_call():
    class Switching(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 10)
            )

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.net.train()  # such as after a look at its own metrics in eval mode
            return loss

    module = Switching()
    step = step_of(module)
    with step.repeatable(CPU):
        losses = {float(step.loss(batch_of())) for _ in range(4)}
    assert len(losses) == 1
    module.net[2].eval()
    with step.repeatable(CPU, "own"):
        step(batch_of())
    assert not module.net[2].training
    assert module.net[3].training


def test_requires_grad_and_gradients_are_as_before():
    class Freezing(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.b.requires_grad_(False)
            x = batch[0].flatten(1)
            return F.cross_entropy(self.a(x) + self.b(x), batch[1])

    module = Freezing()
    for each in module.parameters():
        each.grad = torch.ones_like(each)
    step = step_of(module)
    with step.repeatable(CPU):
        step.loss(batch_of())
    assert all(each.requires_grad for each in module.parameters())
    assert all(each.grad is not None and bool((each.grad == 1).all()) for each in module.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(nasty, whole):
    step_module = nasty
    if whole:
        nasty.compile(backend="eager")
    else:
        nasty.child.net = torch.compile(nasty.child.net, backend="eager")
    before = nasty.child.calls, flat(nasty.accuracy), nasty.steps, flat(nasty.seen)
    step = step_of(step_module)
    from lightning_wdefense.modules.state.isolation import eager

    with eager(), step.repeatable(CPU):
        losses = {float(step.loss(batch_of())) for _ in range(3)}
    assert len(losses) == 1
    assert before == (nasty.child.calls, flat(nasty.accuracy), nasty.steps, flat(nasty.seen))


class Rehearsing(L.Callback):
    """Calls the step in the middle of training, many times."""

    def __init__(self, fails=False):
        self.fails, self.differences = fails, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rehearse(trainer, module, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rehearse(trainer, module, batch)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rehearse(trainer, module, batch)

    def rehearse(self, trainer, module, batch):
        def state():
            connector = trainer._logger_connector
            return (
                flat(module),
                flat(dict(trainer.callback_metrics)),
                flat(dict(trainer.logged_metrics)),
                flat(dict(trainer.progress_bar_metrics)),
                flat([each.state_dict() for each in trainer.optimizers]),
                flat([each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]),
                connector._current_fx,
                [id(each) for each in trainer.loggers],
                randoms(),
            )

        before, step = state(), step_of(module)
        module.fails = self.fails
        try:
            with step.repeatable(CPU):
                losses = {float(step.loss(batch)) for _ in range(3)}
            assert len(losses) == 1
        except RuntimeError:
            assert self.fails
        module.fails = False
        self.differences += same(before, state())


def run(folder: Path, *callbacks, **options):
    L.seed_everything(0, verbose=False)
    module = Nasty()
    x, y = batch_of(64)
    loader = DataLoader(TensorDataset(x, y), 16)
    loggers = [CSVLogger(str(folder), "csv", flush_logs_every_n_steps=1), TensorBoardLogger(str(folder), "tb")]
    trainer = quiet_trainer(max_epochs=2, logger=loggers, callbacks=list(callbacks), log_every_n_steps=1, **options)
    trainer.fit(module, loader)
    return module, trainer


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(next(folder.rglob("events.out*"))))
    accumulator.Reload()
    return {
        tag: [(each.step, each.value) for each in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}], ids=["plain", "bf16"]
)
def test_under_the_trainer_a_rehearsal_is_not_there(tmp_path, fails, options):
    alone, first = run(tmp_path / "alone", **options)
    rehearsing = Rehearsing(fails)
    watched, second = run(tmp_path / "watched", rehearsing, **options)
    assert sorted(set(rehearsing.differences)) == []
    assert same(flat(alone), flat(watched)) == []
    for kind in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        assert same(flat(dict(getattr(first, kind))), flat(dict(getattr(second, kind)))) == [], kind
    assert events(tmp_path / "alone") == events(tmp_path / "watched")
    texts = [next((tmp_path / name).rglob("metrics.csv")).read_text() for name in ("alone", "watched")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) > 4


def test_with_a_trainer_that_is_not_running(tmp_path):
    module, _ = run(tmp_path)
    before, step = flat(module), step_of(module)
    with step.repeatable(CPU):
        assert float(step.loss(batch_of())) == float(step.loss(batch_of()))
    assert same(before, flat(module)) == []

"""CIFAR-10 (JPEG-coded), PreAct ResNet-18, L-infinity, eps 8/255, one seed.

One cycle of the learning rate, bf16, PGD with seven steps as a graph, as many epochs as the time allows and the same for all. Robust is what
APGD-CE and the targeted APGD leave of the first 1,000 test images, with its 95% interval (Wilson); differences of less than about
3 points are within what one seed is worth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from gpu_stages.book import Row
from gpu_stages.classifier import Classifier, OnCard, network, trainer
from gpu_stages.context import Context
from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD, Execution, worst_case
from lightning_wdefense.attacks.autoattack import autoattack_part

EPS = 8 / 255
BATCH = 256
LR = 0.2
TESTED = 1000
"""Test images that the strong attacks see."""
STEPS = 7
"""Of PGD in training, as in Madry et al. (2018)."""
WARM, TRIAL = 15, 15
"""Steps before the clock starts, and steps from which the time of an epoch is foretold."""
EVALUATION = 25.0
"""Seconds that are set aside for the evaluation of each network."""
LEAST, MOST = 8, 30
"""Epochs below which a recipe is left out so that the others have more, and that are enough."""
PART = 15 * 2**20
"""Bytes of a file of a checkpoint."""


@dataclass(frozen=True)
class Run:
    """A recipe with changes, perhaps with averaged weights.

    ``passes`` is what a step costs, in forward and backward passes, by which the time of the others follows from that of the first.
    """

    recipe: str
    passes: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False

    @property
    def name(self) -> str:
        return " + ".join((self.recipe, *self.changes, *["ema"] * self.averaged))


RUNS = (
    Run("pgd-at", STEPS + 1),
    Run("class-transport", STEPS + 2.5),
    Run("trades", STEPS + 5, {"awp": 0.005}, averaged=True),
)


@dataclass(frozen=True)
class Images:
    """On the device, in [0, 1]."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def images(context: Context) -> Images:
    if context.rehearse:
        rng = np.random.default_rng(0)
        arrays = [rng.integers(0, 256, (16, 32, 32, 3)), rng.integers(0, 10, 16)] * 2
    else:
        assert context.data is not None
        with np.load(context.data / "cifar10.npz") as file:
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    x, y, test_x, test_y = (torch.from_numpy(np.asarray(array)).to(context.device) for array in arrays)
    x, test_x = (each.permute(0, 3, 1, 2).float().div(255) for each in (x, test_x))
    return Images(x, y.long().flatten(), test_x, test_y.long().flatten())


def callbacks(run: Run, context: Context) -> list[L.Callback]:
    execution = Execution(precision="bf16", channels_last=True, graph=True)
    recipe = Recipe.named(run.recipe, ThreatModel(eps=EPS), warmup_epochs=0, execution=execution, **run.changes)
    assert isinstance(recipe.attack, PGD)
    recipe = replace(recipe, attack=replace(recipe.attack, steps=STEPS))
    averaging: list[L.Callback] = []
    if run.averaged:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        averaging = [EMAWeightAveraging(decay=0.995)]
    return [*averaging, WassersteinDefense(recipe, seed=0)]


def fit(run: Run, data: Images, context: Context, *more: L.Callback, **limits: Any) -> tuple[Classifier, float]:
    """A trained module, and how long the training took."""
    L.seed_everything(0, verbose=False)
    module = Classifier(network(context.rehearse), LR)
    loader = OnCard(data.x, data.y, BATCH, 0, augmented=True)
    training = trainer(context.device, "bf16-mixed", [*callbacks(run, context), *more], **limits)
    context.synchronize()
    start = time.perf_counter()
    training.fit(module, loader)
    context.synchronize()
    return module.to(context.device).eval(), time.perf_counter() - start


class Clock(L.Callback):
    """Seconds of a step, once those are over in which things happen for the first time."""

    def __init__(self, context: Context) -> None:
        self.context, self.times = context, [math.nan] * 2

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in (WARM, WARM + TRIAL):
            self.context.synchronize()
            self.times[trainer.global_step != WARM] = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self.times[1] - self.times[0]) / TRIAL


class Deadline(L.Callback):
    """Ends a training that would leave no time for the evaluation: better fewer epochs than nothing."""

    def __init__(self, context: Context) -> None:
        self.context, self.met = context, False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.context.left < EVALUATION and not self.context.rehearse:
            self.met = trainer.should_stop = True


def seconds_of_an_epoch(run: Run, data: Images, context: Context) -> float:
    """From a short training."""
    clock = Clock(context)
    fit(run, data, context, clock, max_steps=WARM + TRIAL + 1, max_epochs=-1)
    return clock.seconds * max(1, len(data.y) // BATCH)


def wilson(right: int, of: int) -> list[float]:
    """95% interval of a share, in percent."""
    z, p = 1.96, right / of
    middle, half = p + z**2 / (2 * of), z * math.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    return [100 * (middle - half) / (1 + z**2 / of), 100 * (middle + half) / (1 + z**2 / of)]


def evaluated(module: Classifier, data: Images, context: Context) -> Row:
    """Accuracies in percent: clean on all test images, PGD and both APGD on the first of them."""
    threat = ThreatModel(eps=EPS)
    with torch.no_grad():
        parts = zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
        clean = sum(int((module(x).argmax(1) == y).sum()) for x, y in parts) / len(data.test_y)
    x, y = data.test_x[:TESTED], data.test_y[:TESTED]
    if context.rehearse:  # else nothing is right, and no attack runs
        y = module(x).argmax(1)
    steps = 2 if context.rehearse else 100
    start = time.perf_counter()
    pgd = worst_case(module, {"pgd": PGD(threat, steps=2 if context.rehearse else 20)}, x, y)
    strong = {part: autoattack_part(part, threat, steps=steps) for part in ("apgd-ce", "apgd-t")}
    found = worst_case(module, strong, x, y)
    robust = int(found.robust.sum())
    return {
        "clean %": 100 * clean,
        "PGD-20 %": 100 * float(pgd.robust.float().mean()),
        "robust %": 100 * robust / len(y),
        "95%": wilson(robust, len(y)),
        "evaluation, s": time.perf_counter() - start,
    }


def keep(module: Classifier, run: Run, context: Context) -> None:
    """The weights in half precision, in files of at most :data:`PART` bytes."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in module.state_dict().items():
        small = tensor.detach().cpu()
        small = small.half() if small.is_floating_point() else small
        if size + small.nbytes > PART:
            parts.append({})
            size = 0
        parts[-1][name] = small.contiguous()
        size += small.nbytes
    for i, part in enumerate(parts):
        torch.save(part, context.book.folder / f"cifar_{run.recipe}.{i}.pt")


def plan(data: Images, context: Context) -> tuple[int, list[Run]]:
    """How many epochs, and of which recipes: all of them if there is time for enough epochs."""
    known = context.book.stage(context.stage)
    if known.get("rows"):  # those that are there were trained for so long
        return known["epochs"], [run for run in RUNS if run.name in known["runs"]]
    first = seconds_of_an_epoch(RUNS[0], data, context)
    taken = {run.name: first * run.passes / RUNS[0].passes for run in RUNS}
    for count in range(len(RUNS), 0, -1):
        some = RUNS[:count]
        epochs = int((context.left - EVALUATION * count) / (1.1 * sum(taken[run.name] for run in some)))
        if epochs >= LEAST or count == 1:
            break
    epochs = 1 if context.rehearse else min(MOST, max(1, epochs))
    context.book.note(
        context.stage, epochs=epochs, runs=[run.name for run in some],
        foretold={name: round(seconds, 2) for name, seconds in taken.items()},
    )  # fmt: skip
    return epochs, list(some)


def run(context: Context) -> None:
    torch.backends.cudnn.benchmark = True
    data = images(context)
    epochs, runs = plan(data, context)

    def one(run: Run) -> Row:
        deadline = Deadline(context)
        module, seconds = fit(run, data, context, deadline, max_epochs=epochs)
        found: Row = {"epochs": epochs, "cut short": deadline.met, "training, s": seconds}
        context.book.row(context.stage, run.name, found | {"error": "not evaluated yet"})
        keep(module, run, context)
        return found | evaluated(module, data, context)

    for each in runs:
        context.measure(each.name, lambda run=each: one(run), seconds=30)

"""CIFAR-10 (JPEG-coded), PreAct ResNet-18, L-infinity, eps 8/255, one seed.

One cycle of the learning rate, bf16, PGD with seven steps as a graph, as many epochs as the time allows and the same for all. Robust is what
APGD-CE and the targeted APGD leave of the first 1,000 test images, with its 95% interval (Wilson); differences of less than about
3 points are within what one seed is worth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from benchmarks.gpu.book import Row
from benchmarks.gpu.classifier import Classifier, Clock, OnCard, network, trainer
from benchmarks.gpu.context import Context
from benchmarks.shared.variants import Variant
from lightning_wdefense import ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD, Execution, get_attack, worst_case

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


RUNS = {"pgd-at": STEPS + 1, "class-transport": STEPS + 2.5, "trades:awp=0.005+avg": STEPS + 5}
"""Recipes in their order, and what a step of each costs in forward and backward passes: from the first one's time follow the others'."""


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


def callbacks(run: Variant, context: Context) -> list[L.Callback]:
    execution = Execution(precision="bf16", channels_last=True, graph=True)
    recipe = run.with_changes({"attack.steps": STEPS}).recipe(ThreatModel(eps=EPS))
    recipe = replace(recipe, warmup_epochs=0, execution=execution)
    averaging: list[L.Callback] = []
    if run.averaged:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        averaging = [EMAWeightAveraging(decay=0.995)]
    return [*averaging, WassersteinDefense(recipe, seed=0)]


def fit(run: Variant, data: Images, context: Context, *more: L.Callback, **limits: Any) -> tuple[Classifier, float]:
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


class Deadline(L.Callback):
    """Ends a training that would leave no time for the evaluation: better fewer epochs than nothing."""

    def __init__(self, context: Context) -> None:
        self.context, self.met = context, False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.context.left < EVALUATION and not self.context.rehearse:
            self.met = trainer.should_stop = True


def seconds_of_an_epoch(run: Variant, data: Images, context: Context) -> float:
    """From a short training."""
    clock = Clock(WARM, TRIAL)
    fit(run, data, context, clock, max_steps=WARM + TRIAL + 1, max_epochs=-1)
    return clock.seconds[0] * max(1, len(data.y) // BATCH)


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
    strong = {part: get_attack(part, threat, steps=steps) for part in ("apgd-ce", "apgd-t")}
    found = worst_case(module, strong, x, y)
    robust = int(found.robust.sum())
    return {
        "clean %": 100 * clean,
        "PGD-20 %": 100 * float(pgd.robust.float().mean()),
        "robust %": 100 * robust / len(y),
        "95%": [100 * share for share in binomtest(robust, len(y)).proportion_ci(method="wilson")],
        "evaluation, s": time.perf_counter() - start,
    }


def keep(module: Classifier, run: Variant, context: Context) -> None:
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
        torch.save(part, context.book.folder / f"cifar_{run.name}.{i}.pt")


def plan(data: Images, context: Context) -> tuple[int, list[Variant]]:
    """How many epochs, and of which recipes: all of them if there is time for enough epochs."""
    known = context.book.stage(context.stage)
    if known.get("rows"):  # those that are there were trained for so long
        return known["epochs"], [Variant.parse(label) for label in known["runs"]]
    runs = [Variant.parse(label) for label in RUNS]
    a_pass = seconds_of_an_epoch(runs[0], data, context) / RUNS[runs[0].label]
    taken = {label: a_pass * passes for label, passes in RUNS.items()}
    for count in range(len(runs), 0, -1):
        some = runs[:count]
        epochs = int((context.left - EVALUATION * count) / (1.1 * sum(taken[run.label] for run in some)))
        if epochs >= LEAST or count == 1:
            break
    epochs = 1 if context.rehearse else min(MOST, max(1, epochs))
    context.book.note(
        context.stage, epochs=epochs, runs=[run.label for run in some],
        foretold={name: round(seconds, 2) for name, seconds in taken.items()},
    )  # fmt: skip
    return epochs, some


def run(context: Context) -> None:
    torch.backends.cudnn.benchmark = True
    data = images(context)
    epochs, runs = plan(data, context)

    def one(run: Variant) -> Row:
        deadline = Deadline(context)
        module, seconds = fit(run, data, context, deadline, max_epochs=epochs)
        found: Row = {"epochs": epochs, "cut short": deadline.met, "training, s": seconds}
        context.book.row(context.stage, run.label, found | {"error": "not evaluated yet"})
        keep(module, run, context)
        return found | evaluated(module, data, context)

    for each in runs:
        context.measure(each.label, lambda run=each: one(run), seconds=30)

"""A training that something happens to in the middle of a batch, and what is left of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from support.resuming import ResumingData

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

THREAT = ThreatModel(eps=0.2)
CASES = ["pgd-at", "udr", "critic", "trades+awp", "critic+awp"]
EPOCHS, BATCHES, SIZE = 3, 4, 32
WARMUP = 1.6
INTERRUPTED = 5
"""Number of the batch, from 0, in which it happens: the second of the second epoch, in the warm-up."""

MOMENTS = ["before the attack", "attack", "training step", "before backward", "backward", "optimizer step"]
"""Moments of a batch before the optimizer has changed a weight, in their order."""

AFTER = {"end of the batch": INTERRUPTED + 1, "validation": EPOCHS * BATCHES, "measurement": EPOCHS * BATCHES}
"""Moments when the weights have changed, with the batch that a resumed training begins with."""


class Job(DigitsClassifier):
    """Calls a function at a moment of the interrupted batch."""

    def __init__(
        self, moment: str | None, happens: Callable[[], None] | None, batch: int = INTERRUPTED, batch_norm: bool = False
    ) -> None:
        super().__init__(batch_norm, learning_rate=0.01)
        self.moment, self.happens, self.batch = moment, happens, batch

    def at(self, moment: str) -> None:
        trainer = self._trainer
        if moment != self.moment or not trainer.training:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed != self.batch:
            return
        self.moment = None  # once
        assert self.happens is not None
        self.happens()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at("attack")
        return super().forward(x)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.at("before the attack")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.at("training step")
        if self.moment == "backward":
            loss.register_hook(lambda gradient: self.at("backward"))
        return loss

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.at("before backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.at("optimizer step")

    def on_train_batch_end(self, *args: Any) -> None:
        self.at("end of the batch")


class Measuring(PGD):
    """Calls a function in the middle of the next attack, once."""

    happens: list[Callable[[], None]] = []  # noqa: RUF012

    def perturb(self, problem: Any) -> torch.Tensor:
        while Measuring.happens:
            Measuring.happens.pop()()
        return super().perturb(problem)


class InValidation(L.Callback):
    """Calls a function in the second batch of the last validation."""

    def __init__(self, moment: str, happens: Callable[[], None]) -> None:
        self.moment, self.happens = moment, happens

    def on_validation_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.current_epoch == EPOCHS - 1 and batch_idx == 1:
            if self.moment == "validation":
                self.happens()
            elif self.moment == "measurement":
                Measuring.happens.append(self.happens)


class Logged(L.Callback):
    """Keeps the logged eps of each batch, and what the monitor logged in each epoch."""

    def __init__(self) -> None:
        self.eps: dict[int, float] = {}
        self.monitored: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self.eps[batch] = float(trainer.callback_metrics["defense/eps"])

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.monitored[trainer.current_epoch] = {
            key: value for key, value in metrics.items() if key.startswith(("val", "robust"))
        }


class Run:
    """One training of a case.

    Args:
        case: name of a recipe, with ``+awp`` for perturbed weights.
        folder: for checkpoints.
        moment: when something happens.
        happens: what happens.
        slurm: whether it is a job of SLURM's, which a signal requeues. The environment variables must say so as well.
        batch: number of the batch in which it happens.
        batch_norm: whether the model has statistics of the batches.
        callbacks: further callbacks.
    """

    def __init__(
        self,
        case: str,
        folder: Path,
        moment: str | None = None,
        happens: Callable[[], None] | None = None,
        *,
        slurm: bool = False,
        batch: int = INTERRUPTED,
        batch_norm: bool = False,
        callbacks: tuple[L.Callback, ...] = (),
        **options: Any,
    ) -> None:
        self.case, self.logged = case, Logged()
        name, _, more = case.partition("+")
        recipe = Recipe.named(name, THREAT, awp=0.01 if more else 0.0, warmup_epochs=WARMUP)
        self.defense = WassersteinDefense(recipe)
        weaker = ThreatModel(eps=0.05)
        self.monitor = RobustnessMonitor(weaker, {"pgd": Measuring(weaker, steps=2)}, progress=False, every_n_epochs=2)
        self.make = lambda: Job(moment, happens, batch, batch_norm)
        watching = () if happens is None or moment is None else (InValidation(moment, happens),)
        self.trainer = quiet_trainer(
            max_epochs=EPOCHS,
            default_root_dir=folder,
            callbacks=[self.logged, self.defense, self.monitor, *watching, *callbacks],
            plugins=[SLURMEnvironment()] if slurm else None,
            num_sanity_val_steps=0,
            enable_checkpointing=bool(callbacks),
            **options,
        )

    def fit(self, ckpt_path: Any = None, seed: int = 0) -> Run:
        """Train; with the seed of the weights and of everything that is random, which a resumed run must not need."""
        L.seed_everything(seed, verbose=False)
        self.module = self.make()
        train, validation = digits_loaders(SIZE, train_size=SIZE * BATCHES)
        data = ResumingData(train.dataset, validation, SIZE)
        self.trainer.fit(self.module, datamodule=data, ckpt_path=ckpt_path)
        return self

    def left(self) -> dict[str, Any]:
        """The weights, the optimizer's state, what was learned, the warm-up and the monitored values."""
        return {
            "weights": plain(dict(self.module.state_dict())),
            "optimizer": plain(self.trainer.optimizers[0].state_dict()["state"]),
            "learned": copy.deepcopy(plain(self.defense.state_dict())),
            "monitored": self.logged.monitored,
            "monitor": self.monitor.state_dict(),
            "eps": self.logged.eps,
        }


def assert_goes_on(resumed: dict[str, Any], whole: dict[str, Any], first: int) -> None:
    """A resumed training ended as the whole one, bit for bit, and ran the batches from ``first`` on."""
    assert whole["learned"]["batches"] == EPOCHS * BATCHES
    assert sorted(resumed["eps"]) == list(range(first, EPOCHS * BATCHES))
    assert resumed["eps"] == {batch: eps for batch, eps in whole["eps"].items() if batch >= first}
    epochs = range(min(first // BATCHES, EPOCHS - 1), EPOCHS)
    assert resumed["monitored"] == {epoch: whole["monitored"][epoch] for epoch in epochs}
    for what in ("weights", "optimizer", "learned", "monitor"):
        assert resumed[what] == whole[what], what

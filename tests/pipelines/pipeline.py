"""What the matrix knows of one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense import ThreatModel

Inputs = Tensor | list[Tensor]
BOX = ThreatModel(eps=0.1)
"""For images in [0, 1]."""


@dataclass(frozen=True)
class Pipeline:
    """A module that somebody wrote, its data, and what is true of it.

    Args:
        name: for ``pytest -k``.
        task: its row in the documentation.
        make: the untouched module.
        loaders: the training loader and that or those of validation (``None`` for none).
        true_loss: of a validation batch on other inputs, by hand: what the test's own attack maximises, a scalar or one a sample.
        score: the value of ``metric`` on a validation batch with other inputs, by hand.
        clean_inputs: what is attacked in a batch: the very tensors that the batch holds (training by hand writes into them), or the
            outputs of the submodule ``arguments["perturb"]``.
        threat: what the attacker may do.
        arguments: what the user must say to our callbacks beside the recipe and the threat; ``{}`` for an untouched pipeline.
        monitor_arguments: what to the monitor, where validation batches look different.
        metric: the user's own key of validation; ``None`` where nothing is logged.
        better: the direction of the score.
        train_loss, train_inputs: where training batches look different.
        tolerance: of the monitor's value beside the test's own attack: absolute, or a share of it where lower is better.
        gain: what adversarial training must gain in the score under the test's own attack: absolute, or a share of the plain
            module's where lower is better. About half of what training by hand gains (``calibrate.py``).
        epochs: of every training.
        trainer: the user's own options of the Trainer.
        defended: the module that defends itself by the mixin, instead of the callback.
        refused: what the error says, for a pipeline that can't be defended.
        needs: a package that must be there.
    """

    name: str
    task: str
    make: Callable[[], Any]
    loaders: Callable[[], tuple[Any, Any]]
    true_loss: Callable[[Any, Any, Any], Tensor] | None = None
    score: Callable[[Any, Any, Any], float] | None = None
    clean_inputs: Callable[[Any, Any], Inputs] = lambda module, batch: batch[0]
    threat: ThreatModel = BOX
    arguments: dict[str, Any] = field(default_factory=dict)
    monitor_arguments: dict[str, Any] | None = None
    metric: str | None = "val_acc"
    better: Literal["higher", "lower"] = "higher"
    train_loss: Callable[[Any, Any, Any], Tensor] | None = None
    train_inputs: Callable[[Any, Any], Inputs] | None = None
    tolerance: float = 0.06
    gain: float = 0.1
    epochs: int = 10
    trainer: dict[str, Any] = field(default_factory=dict)
    defended: Callable[[], Any] | None = None
    refused: str | None = None
    needs: str | None = None

    def __str__(self) -> str:
        return self.name

    def improvement(self, before: float, after: float) -> float:
        """How much better the second score is: absolute, or as a share of the first where lower is better."""
        return after - before if self.better == "higher" else (before - after) / abs(before)

    def agrees(self, measured: float, true: float) -> bool:
        """Whether the monitor's value is the test's own."""
        return abs(measured - true) <= self.tolerance * (1 if self.better == "higher" else abs(true))


def classifier(
    name: str,
    make: Callable[[], Any],
    loaders: Callable[[], tuple[Any, Any]],
    logits: Callable[[Any, Any, Any], Tensor] = lambda module, batch, x: module(x),
    labels: Callable[[Any], Tensor] = lambda batch: batch[1],
    task: str = "classification",
    **options: Any,
) -> Pipeline:
    """A pipeline whose true loss is the cross-entropy and whose score is the accuracy."""
    return Pipeline(
        name,
        task,
        make,
        loaders,
        true_loss=lambda module, batch, x: F.cross_entropy(logits(module, batch, x), labels(batch), reduction="none"),
        score=lambda module, batch, x: accuracy(logits(module, batch, x), labels(batch)),
        **options,
    )


def regressor(
    name: str,
    make: Callable[[], Any],
    loaders: Callable[[], tuple[Any, Any]],
    predict: Callable[[Any, Any, Any], Tensor] = lambda module, batch, x: module(x),
    target: Callable[[Any], Tensor] = lambda batch: batch[1],
    task: str = "regression",
    metric: str = "val_mse",
    tolerance: float = 0.15,
    **options: Any,
) -> Pipeline:
    """A pipeline whose true loss and score are the mean squared error."""

    def error(module: Any, batch: Any, x: Any) -> Tensor:
        squared = (predict(module, batch, x) - target(batch)).square()
        return squared.reshape(len(squared), -1).mean(1)

    return Pipeline(
        name,
        task,
        make,
        loaders,
        true_loss=error,
        score=lambda module, batch, x: error(module, batch, x).mean().item(),
        metric=metric,
        better="lower",
        tolerance=tolerance,
        **options,
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of the samples whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


def tensors(inputs: Inputs) -> Sequence[Tensor]:
    """One or several inputs as a list."""
    return [inputs] if isinstance(inputs, torch.Tensor) else inputs

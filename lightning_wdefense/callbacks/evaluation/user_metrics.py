"""Runs a module's own evaluation a second time, on attacked batches, and collects the metrics that it logs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._compat import LightningModule, Trainer
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.state.isolation import isolated
from lightning_wdefense.modules.state.muted_logging import logging_to, muted_optimizers, result_collection, running_hook
from lightning_wdefense.modules.state.step_state import StepState
from lightning_wdefense.modules.steps import unwrapped_step


class AttackedEvaluation:
    """A second run of an evaluation epoch, on attacked batches, in parallel to the one that the trainer runs.

    It has its own metrics, containers and logged values. They replace those of the module while it runs, and the module's are
    restored afterwards. It calls the module's step, and the hooks around each batch and at the end of the epoch, as Lightning does.
    Logged values are averaged and reduced over ranks as Lightning does.

    Args:
        trainer: a trainer in an evaluation epoch, before its first step.
        module: the user's module.
        stage: ``"validation"`` or ``"test"``.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._trainer, self._module, self._stage = trainer, module, stage
        self._results = result_collection()(training=False)
        self._state = StepState(module)
        self._loader: int | None = None
        self._stepped = False
        self._values: dict[str, Tensor] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """Evaluate an attacked batch with the module's own step and hooks.

        Args:
            batch: the attacked batch.
            batch_idx: index of the batch in its dataloader.
            dataloader_idx: index of the dataloader if there are several, else ``None``.
        """
        self._stepped = True
        module, name = self._module, f"{self._stage}_step"
        batch = map_tensors(batch, torch.clone)  # the step may modify it
        function = unwrapped_step(module, name)
        with self._alive():
            results = self._results
            if dataloader_idx != self._loader:
                self._collect()  # as Lightning does, before a metric is used for another dataloader
            self._loader = dataloader_idx
            results.batch, results.batch_size, results.dataloader_idx = batch, None, dataloader_idx
            arguments = (batch, batch_idx) if dataloader_idx is None else (batch, batch_idx, dataloader_idx)
            self._hook(f"on_{self._stage}_batch_start", *arguments)
            with running_hook(module, name):
                output = function(batch, *step_arguments(function, batch_idx, dataloader_idx))
            self._hook(f"on_{self._stage}_batch_end", output, *arguments)
            results.batch = results.batch_size = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """End the epoch, and return its logged values by the module's own keys; empty if no batch was attacked."""
        if not self._stepped:  # the module's hook may need at least one batch
            return {}
        with self._alive():
            self._collect()
            self._results.dataloader_idx = None
            self._hook(f"on_{self._stage}_epoch_end")
            self._values |= self._results.metrics(on_step=False)["callback"]
        return {key: float(value) for key, value in self._values.items()}

    def _collect(self) -> None:
        self._results.dataloader_idx = self._loader
        self._values |= self._results.metrics(on_step=False)["callback"]

    def _hook(self, name: str, *arguments: Any) -> None:
        with running_hook(self._module, name):
            getattr(self._module, name)(*arguments)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        module = self._module
        with isolated(module, module.device, evaluation=False), torch.no_grad(), muted_optimizers(module):
            theirs = StepState(module)
            self._state.restore()
            self._state.usable()
            try:
                with logging_to(self._trainer, self._results):
                    yield
            finally:
                self._state = StepState(module)
                theirs.restore()


def step_arguments(function: Callable[..., Any], batch_idx: int, dataloader_idx: int | None = None) -> tuple[int, ...]:
    """The arguments of a step after the batch, as Lightning passes them: batch index, and dataloader index if there are several."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    several = len(positional) >= 2 or any(each.kind == each.VAR_POSITIONAL for each in parameters)
    indices = (batch_idx,) if several or any(each.name == "batch_idx" for each in parameters) else ()
    return indices if dataloader_idx is None else (*indices, dataloader_idx)

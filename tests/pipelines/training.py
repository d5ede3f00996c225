"""Training a pipeline with and without callbacks, and robustly by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L
import torch
from pipelines.attack import attacked
from pipelines.pipeline import Pipeline, tensors
from support.lightning_modules import quiet_trainer
from torch import Tensor


class Run(NamedTuple):
    """What came of a training."""

    module: L.LightningModule
    trainer: L.Trainer
    val: Any

    @property
    def loader(self) -> Any:
        """The validation loader with the labels."""
        return self.val[0] if isinstance(self.val, list) else self.val

    @property
    def logged(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.trainer.callback_metrics.items()}


def fit(pipeline: Pipeline, *callbacks: L.Callback, by_mixin: bool = False, **options: Any) -> Run:
    """Train the pipeline from the same seed."""
    L.seed_everything(0, verbose=False)
    module = pipeline.defended() if by_mixin and pipeline.defended else pipeline.make()
    train, val = pipeline.loaders()
    options = {"max_epochs": pipeline.epochs, "callbacks": list(callbacks)} | pipeline.trainer | options
    trainer = quiet_trainer(**options)
    trainer.fit(module, train, val)
    return Run(module, trainer, val)


class ByHand(L.Callback):
    """Adversarial training without our package: the batch, or a submodule's output, is moved before the step sees it."""

    def __init__(self, pipeline: Pipeline, steps: int = 5) -> None:
        self.pipeline, self.steps, self.hook = pipeline, steps, None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0:
            return
        path = self.pipeline.arguments.get("perturb")
        state = torch.get_rng_state()
        worst = tensors(attacked(self.pipeline, pl_module, batch, self.steps, training=True))
        torch.set_rng_state(state)
        inputs = tensors((self.pipeline.train_inputs or self.pipeline.clean_inputs)(pl_module, batch))
        if path is None:
            for x, moved in zip(inputs, worst, strict=True):
                x.data.copy_(moved)
        else:
            delta = (worst[0] - inputs[0]).detach()
            self.hook = pl_module.get_submodule(path).register_forward_hook(lambda part, args, output: output + delta)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

"""What the monitors share: measure on validation and test batches, log at the end of the epoch, leave no trace."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import Callback, LightningModule, Trainer, dataloader_suffix, rank_zero_warn
from lightning_wdefense._strategy import check_strategy
from lightning_wdefense.callbacks.progress import RichProgress, TqdmProgress, attack_progress
from lightning_wdefense.callbacks.schedule import evaluation_generator, is_due
from lightning_wdefense.callbacks.support import attacked_model
from lightning_wdefense.modules.batches import Batches, Key
from lightning_wdefense.modules.isolation import eager, isolated
from lightning_wdefense.modules.recording import OUTPUTS, PENULTIMATE, ForwardRecorder

MeasuresT = TypeVar("MeasuresT")
Noise = Callable[[], torch.Generator]


class EvaluationMonitor(Callback, Generic[MeasuresT]):
    """Attacks validation and test batches, measures, and logs at the end of each epoch.

    It skips the sanity check, keeps to its schedule (on epochs in between the last values are logged again, so that monitored
    keys never go missing), works under ``inference_mode`` and the trainer's precision, and tells several dataloaders apart. Subclasses
    say what is measured: :meth:`new_measures`, :meth:`measure` and :meth:`compute`.

    Args:
        every_n_epochs: measure only every so many training epochs (the first validation always).
        max_batches: measure only the first batches of each dataloader.
        features: where features are taken from; ``None`` for nowhere.
        model: dotted path to the submodule that takes the inputs and returns logits, if not the module itself.
        inputs: position, key or attribute of the inputs in a batch.
        labels: the same for the labels.
        seed: seeds the attacks' noise.
        progress: show a progress bar.
        name: tells several monitors apart.

    Raises:
        ValueError: if ``every_n_epochs`` or ``max_batches`` is below 1.
    """

    attacks_a_batch: int = 1

    def __init__(
        self,
        *,
        every_n_epochs: int,
        max_batches: int | None,
        features: str | None,
        model: str | None,
        inputs: Key,
        labels: Key,
        seed: int,
        progress: bool,
        name: str | None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, or None for all, got {max_batches}.")
        self.every_n_epochs, self.max_batches, self.features = every_n_epochs, max_batches, features
        self.model, self.seed, self.progress, self.name = model, seed, progress, name
        self._batches = Batches(inputs, labels)
        self._measures: dict[int, MeasuresT] = {}
        self._last: dict[str, dict[str, float]] = {}
        self._epoch: int | None = None
        self._bar: TqdmProgress | RichProgress | None = None

    @abstractmethod
    def new_measures(self, device: torch.device) -> MeasuresT:
        """What is kept of one dataloader, still empty."""

    @abstractmethod
    def measure(self, measures: MeasuresT, model: nn.Module, inputs: Tensor, labels: Any, noise: Noise) -> None:
        """Attack a batch and add to the measures; gradients are off, and ``noise`` makes the batch's generator anew."""

    @abstractmethod
    def compute(self, measures: MeasuresT, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """The values of one dataloader, the same on every rank, by short names that ``key`` makes long."""

    @property
    def state_key(self) -> str:
        """Identifies the callback in a checkpoint: by ``name`` alone."""
        return f"{type(self).__name__}({self.name!r})"

    def state_dict(self) -> dict[str, Any]:
        """The last values, which a resumed run logs on epochs that are not measured, and the epoch they are of."""
        return {"last": self._last, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last values back."""
        self._last, self._epoch = dict(state_dict["last"]), state_dict["epoch"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no evaluation: it has no progress bar and nothing half measured.
        return self.__dict__ | {"_bar": None, "_measures": {}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the strategy leaves the model whole."""
        check_strategy(trainer, type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first epoch what is needed only after it."""
        self._recorder(attacked_model(pl_module, self.model))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._start(trainer, pl_module, trainer.num_val_batches)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._start(trainer, pl_module, trainer.num_test_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on the batch."""
        self._measure(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure on the batch."""
        self._measure(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured."""
        self._finish(trainer, pl_module, "val", trainer.num_val_batches)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured."""
        self._finish(trainer, pl_module, "test", trainer.num_test_batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the progress bar and drop what was half measured."""
        self._close()

    def observe(self, model: nn.Module, *batches: Tensor) -> list[tuple[Any, Tensor]]:
        """The outputs and features ``(N, D)`` of passes in eval mode that leave no trace.

        Where ``"penultimate"`` features are wanted of a model without a linear layer, its outputs are taken, with a warning.
        """
        if not batches:
            return []
        try:
            recorder = self._recorder(model)
            recorder.attach(batches[0], temporary=True)
        except ValueError:
            if self.features != PENULTIMATE:
                raise
            rank_zero_warn("The model runs no nn.Linear, so its outputs are taken for features.")
            self.features = OUTPUTS
            return self.observe(model, *batches)
        try:
            with isolated(model, batches[0].device), eager():
                return [recorder.observe(batch.detach().clone()) for batch in batches]  # the model may work in place
        finally:
            recorder.detach()

    def show(self, attack: str, left: Tensor) -> None:
        """Say on the progress bar that another attack is done, and which samples are left."""
        assert self._bar is not None
        self._bar.advance(f"{attack}: {int(left.sum())}/{len(left)} left in the batch")

    def _start(self, trainer: Trainer, pl_module: LightningModule, num_batches: Sequence[float]) -> None:
        self._close()
        if trainer.sanity_checking or not is_due(trainer, self._epoch, self.every_n_epochs):
            return
        self._recorder(attacked_model(pl_module, self.model))
        limit = float("inf") if self.max_batches is None else self.max_batches
        total = sum(min(limit, batches) for batches in num_batches) * self.attacks_a_batch
        self._bar = attack_progress(trainer, total, show=self.progress)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._bar is None or (self.max_batches is not None and batch_idx >= self.max_batches):
            return
        inputs, labels = self._batches.read(batch)

        def noise() -> torch.Generator:
            return evaluation_generator(trainer, self.seed, batch_idx, dataloader_idx, inputs.device)

        # Evaluation loops run under inference_mode, where even a metric's state could not be used again.
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            if dataloader_idx not in self._measures:
                self._measures[dataloader_idx] = self.new_measures(inputs.device)
            self.measure(self._measures[dataloader_idx], attacked_model(pl_module, self.model), inputs, labels, noise)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, num_batches: Sequence[float]) -> None:
        if trainer.sanity_checking:
            return
        if self._bar is not None:
            prefix = f"{stage}/{self.name}/" if self.name else f"{stage}/"
            values: dict[str, float] = {}
            for index in range(len(num_batches)):
                # Every rank takes part in the reduction, also one whose share of the data was empty.
                measures = self._measures.get(index) or self.new_measures(pl_module.device)
                suffix = dataloader_suffix(index) if len(num_batches) > 1 else ""

                def key(short: str, suffix: str = suffix) -> str:
                    return prefix + short + suffix

                values |= {key(short): value for short, value in self.compute(measures, trainer, key).items()}
            self._last[stage] = values
            if stage == "val":
                self._epoch = trainer.current_epoch
            self._close()
        # The values are the same on every rank already; sync_dist only keeps Lightning from warning that they are not.
        pl_module.log_dict(self._last[stage], sync_dist=True, add_dataloader_idx=False)

    def _recorder(self, model: nn.Module) -> ForwardRecorder:
        return ForwardRecorder(model, OUTPUTS if self.features is None else self.features)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._measures = None, {}

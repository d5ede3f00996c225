"""The base class of the monitors: attack evaluation batches, measure, and log at the end of the epoch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lightning_wdefense._compat import LightningModule, Trainer, dataloader_suffix, loggable_key
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.evaluation.hooks import PREFIX, EvaluationHooks, Stage, batches_of
from lightning_wdefense.callbacks.evaluation.progress import RichProgress, attack_progress
from lightning_wdefense.callbacks.evaluation.route import EvaluationRoute
from lightning_wdefense.callbacks.evaluation.user_metrics import AttackedEvaluation
from lightning_wdefense.callbacks.requirements import attacked_model
from lightning_wdefense.callbacks.schedule import evaluation_generator, is_due, validation_begins
from lightning_wdefense.callbacks.target import Target, Through
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch, Observed
from lightning_wdefense.evaluation.progress import TqdmProgress, status
from lightning_wdefense.evaluation.protocol import Noise, check_max_batches
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick
from lightning_wdefense.modules.parallel import check_strategy
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.recording import OUTPUTS, ForwardRecorder

MeasuresT = TypeVar("MeasuresT")


class EvaluationMonitor(EvaluationHooks, Generic[MeasuresT]):
    """Attacks validation and test batches, measures, and logs at the end of each epoch.

    The monitor does not measure in the sanity check. In epochs without a measurement it logs the last values again, so that
    monitored keys always exist. It works under ``inference_mode`` and in the trainer's precision, and keeps several dataloaders
    apart. Subclasses define the measurement with :meth:`new_measures`, :meth:`measure` and :meth:`compute`.

    Args:
        every_n_epochs: measure every ``n`` training epochs, starting with the first validation.
        max_batches: measure only the first ``max_batches`` batches of each dataloader.
        features: the layer whose features are measured; ``None`` for none.
        model: dotted path to the submodule that takes the inputs and returns logits, if it is not the module itself.
        through: how the attack runs the model, see :class:`~lightning_wdefense.callbacks.evaluation.route.EvaluationRoute`.
        perturb: the submodule whose output is attacked instead of the inputs.
        inputs: where the inputs are in a batch.
        labels: the same for the labels.
        outputs: where the logits are in the model's return value.
        ignore_index: label of elements that are left out.
        dataloaders: indices of the dataloaders whose batches are attacked; ``None`` for all that can be attacked.
        seed: seed of the attacks' noise.
        progress: show a progress bar.
        name: distinguishes several monitors.

    Raises:
        ValueError: if ``every_n_epochs`` or ``max_batches`` is below 1.
    """

    attacks_a_batch: int = 1
    evaluates_again: ClassVar[bool] = False
    """Whether the module's own evaluation also runs on the adversarial values that :meth:`measure` returns."""

    def __init__(
        self,
        *,
        every_n_epochs: int,
        max_batches: int | None,
        features: str | None,
        model: str | None,
        through: Through,
        perturb: str | Perturb | None,
        inputs: Inputs,
        labels: Labels,
        outputs: Pick,
        ignore_index: int | None = None,
        dataloaders: Sequence[int] | None = None,
        seed: int,
        progress: bool,
        name: str | None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        check_max_batches(max_batches)
        self.every_n_epochs, self.max_batches, self.features = every_n_epochs, max_batches, features
        self.model, self.seed, self.progress, self.name, self.through = model, seed, progress, name, through
        self._target = Target.of(through, inputs, labels, perturb=perturb, outputs=outputs, ignore_index=ignore_index)
        self.perturb, self.ignore_index = self._target.perturb, ignore_index
        self.dataloaders = None if dataloaders is None else tuple(dataloaders)
        self._route = EvaluationRoute(self._target)
        self._attacked_evaluation: AttackedEvaluation | None = None
        self._clean: Any = None
        self._measures: dict[int, MeasuresT] = {}
        self._last: dict[str, dict[str, float]] = {}
        self._epoch: int | None = None
        self._validates = False
        self._bar: TqdmProgress | RichProgress | None = None

    @abstractmethod
    def new_measures(self, device: torch.device) -> MeasuresT:
        """New, empty measures for one dataloader."""

    @property
    @abstractmethod
    def _threat(self) -> ThreatModel:
        """The threat model."""

    @abstractmethod
    def _attacks(self) -> Iterable[Attack]:
        """The attacks."""

    @abstractmethod
    def check(self, attacked_batch: AttackedBatch) -> None:
        """Raise an error for a batch that cannot be measured; also called in the sanity check."""

    @abstractmethod
    def measure(self, measures: MeasuresT, attacked_batch: AttackedBatch, noise: Noise) -> Tensor | None:
        """Attack a batch and update the measures.

        Args:
            measures: the measures of the batch's dataloader.
            attacked_batch: the batch. Gradients are disabled.
            noise: creates the batch's random generator, with the same state at every call.

        Returns:
            The adversarial values, if :attr:`evaluates_again`.
        """

    @abstractmethod
    def compute(self, measures: MeasuresT, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """The values of one dataloader by short names, the same on every rank.

        Args:
            measures: the measures of the dataloader.
            trainer: the trainer.
            key: maps a short name to the key under which Lightning logs it.
        """

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint. It depends only on ``name``."""
        return f"{type(self).__name__}({self.name!r})"

    def state_dict(self) -> dict[str, Any]:
        """The last values and their epoch. A resumed run logs them in epochs without a measurement."""
        return {"last": self._last, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last values and their epoch."""
        self._last, self._epoch = dict(state_dict["last"]), state_dict["epoch"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no evaluation, so it has no progress bar and no unfinished measures.
        return self.__dict__ | {
            "_bar": None,
            "_measures": {},
            "_attacked_evaluation": None,
            "_clean": None,
            "_route": EvaluationRoute(self._target),
            "_validates": False,
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the attacks can run under the trainer's strategy."""
        check_strategy(trainer, type(self).__name__, self._attacks())
        self._route, self._validates = EvaluationRoute(self._target), False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make a run that is resumed from the middle of a validation begin this validation anew."""
        if self._validates:
            validation_begins(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first epoch that the attacked model and the features exist."""
        self._check_features(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the progress bar and drop unfinished measures."""
        self._close()

    def observe(self, attacked_batch: AttackedBatch, *batches: Tensor) -> Observed:
        """The outputs and features ``(N, D)`` of forward passes in eval mode without side effects."""
        return attacked_batch.observe(OUTPUTS if self.features is None else self.features, *batches)

    def show(self, attack: str, left: Tensor) -> None:
        """Advance the progress bar by one attack, and show how many samples are still correct."""
        assert self._bar is not None
        self._bar.advance(status(attack, left))

    def _epoch_starts(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        self._close()
        self._validates = stage == "validation" and not trainer.sanity_checking
        if trainer.sanity_checking or not is_due(trainer, self._epoch, self.every_n_epochs):
            return
        self._check_features(pl_module)
        limit = float("inf") if self.max_batches is None else self.max_batches
        total = sum(min(limit, batches) for batches in batches_of(trainer, stage)) * self.attacks_a_batch
        self._bar = attack_progress(trainer, total, show=self.progress)

    def _is_measured(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether a batch is attacked. In the sanity check: whether it is inspected, which only the first batches are."""
        if self.dataloaders is not None and dataloader_idx not in self.dataloaders:
            return False
        if trainer.sanity_checking:
            return batch_idx == 0
        return self._bar is not None and not (self.max_batches is not None and batch_idx >= self.max_batches)

    def _batch_starts(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self.evaluates_again and self._bar is not None and self._attacked_evaluation is None:
            self._attacked_evaluation = AttackedEvaluation(trainer, pl_module, stage)
        self._clean = None
        if self._is_measured(trainer, batch_idx, dataloader_idx):
            with torch.inference_mode(False):  # so that the copies can be differentiated
                self._clean = map_tensors(batch, torch.clone)  # the step may modify its batch

    def _batch_ends(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        if not self._is_measured(trainer, batch_idx, dataloader_idx):
            return
        place = batch_idx, dataloader_idx if len(batches_of(trainer, stage)) > 1 else None
        # Evaluation loops run under inference_mode; tensors made there, even a metric's state, cannot be used in training.
        batch, self._clean = self._clean, None
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
            attacked_batch = self._route.attacked_batch(pl_module, model, self._threat, stage, batch, place)
            if attacked_batch is None:
                return
            if trainer.sanity_checking:
                self.check(attacked_batch)
                return
            inputs = attacked_batch.inputs

            def noise() -> torch.Generator:
                return evaluation_generator(trainer, self.seed, batch_idx, dataloader_idx, inputs.device)

            if dataloader_idx not in self._measures:
                self._measures[dataloader_idx] = self.new_measures(inputs.device)
            self.check(attacked_batch)
            with attacked_batch.ready(), torch.no_grad():
                attacked = self.measure(self._measures[dataloader_idx], attacked_batch, noise)
            if attacked is not None and self._attacked_evaluation is not None:
                with attacked_batch.site.perturbed(attacked) as moved:
                    self._attacked_evaluation.step(moved, *place)

    def _epoch_ends(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        self._route.check()
        if trainer.sanity_checking:
            return
        if self._bar is not None:
            prefix = f"{PREFIX[stage]}/{self.name}/" if self.name else f"{PREFIX[stage]}/"
            values: dict[str, float] = {}
            dataloaders = len(batches_of(trainer, stage))
            for index in range(dataloaders):
                if self._leaves_out(stage, index):
                    continue
                # Every rank takes part in the reduction, even a rank without data.
                measures = self._measures.get(index) or self.new_measures(pl_module.device)
                suffix = dataloader_suffix(index) if dataloaders > 1 else ""

                def key(short: str, suffix: str = suffix) -> str:
                    return prefix + short + suffix

                values |= {key(short): value for short, value in self.compute(measures, trainer, key).items()}
            if self._attacked_evaluation is not None:
                prefix = f"robust/{self.name}/" if self.name else "robust/"
                own = self._attacked_evaluation.finish()
                values |= {prefix + loggable_key(key): value for key, value in own.items()}
            self._last[PREFIX[stage]] = values
            if stage == "validation":
                self._epoch = trainer.current_epoch
            self._close()
        # The values are already the same on every rank; sync_dist only prevents Lightning's warning.
        pl_module.log_dict(self._last[PREFIX[stage]], sync_dist=True, add_dataloader_idx=False)
        self._validates = False

    def _leaves_out(self, stage: Stage, index: int) -> bool:
        return self._route.is_left_out(stage, index) or (self.dataloaders is not None and index not in self.dataloaders)

    def _check_features(self, pl_module: LightningModule) -> None:
        model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
        ForwardRecorder(model, OUTPUTS if self.features is None else self.features)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._measures, self._attacked_evaluation, self._clean = None, {}, None, None

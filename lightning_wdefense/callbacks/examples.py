"""The callback that logs pictures of adversarial examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._compat import LightningModule, Trainer, rank_zero_warn
from lightning_wdefense.attacks import Attack, ThreatModel
from lightning_wdefense.attacks.labels import class_labels, hard_labels
from lightning_wdefense.attacks.registry import evaluation_attacks
from lightning_wdefense.callbacks.evaluation.hooks import PREFIX, EvaluationHooks, Stage, batches_of
from lightning_wdefense.callbacks.evaluation.pictures import Picture, log_pictures, shows_pictures
from lightning_wdefense.callbacks.evaluation.route import EvaluationRoute
from lightning_wdefense.callbacks.requirements import attacked_model
from lightning_wdefense.callbacks.schedule import evaluation_generator, is_due
from lightning_wdefense.callbacks.target import Target, Through
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch, StepBatch
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, logits_of, predictions
from lightning_wdefense.modules.parallel import check_strategy
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.recording import OUTPUTS

MIN_SIDE = 96
"""Height and width (pixels) that a logged picture has at least. Smaller images are enlarged by a whole factor."""


class AdversarialExampleLogger(EvaluationHooks):
    """Logs pictures of a few samples: the clean input, the adversarial input, and the perturbation (amplified around grey).

    The callback shows the first samples of the first validation and test batch. Each sample is one picture under
    ``{stage}/adversarial_examples``; its caption gives label, predictions and confidences. ``WandbLogger`` shows a panel,
    ``TensorBoardLogger`` images with the captions as text. With other loggers the callback does nothing. For inputs that are not
    images ``(N, C, H, W)`` with 1, 3 or 4 channels it only warns.

    Args:
        threat: the threat model: norm, perturbation budget eps (data units) and bounds.
        attack: a name or an attack. It must be bounded, that is, never leave the eps ball.
        samples: number of samples to show.
        every_n_epochs: show pictures every ``n`` training epochs, starting with the first validation.
        class_names: names of the classes for the captions, in the order of the model's outputs.
        model: dotted path to the submodule that takes the inputs and returns logits, if it is not the module itself.
        through: as for :class:`RobustnessMonitor`, like the next three arguments.
        inputs: where the inputs are in a batch.
        labels: the same for the labels.
        outputs: where the logits are in the model's return value.
        seed: seed of the attack's noise.

    Raises:
        ValueError: if the attack is unknown, unbounded or made for another threat model, or if ``samples`` is below 1; in the
            sanity check or at the first batch, if there are fewer ``class_names`` than classes.

    Example:
        >>> from lightning_wdefense import AdversarialExampleLogger, ThreatModel
        >>> logger = AdversarialExampleLogger(ThreatModel(eps=8 / 255), samples=4)
    """

    def __init__(
        self,
        threat: ThreatModel,
        attack: str | Attack = "pgd",
        *,
        samples: int = 8,
        every_n_epochs: int = 1,
        class_names: Sequence[str] | None = None,
        through: Through = "auto",
        model: str | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
        outputs: Pick = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("samples", samples), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        (self.attack,) = evaluation_attacks([attack], threat).values()
        self.threat, self.samples, self.every_n_epochs = threat, samples, every_n_epochs
        self.class_names = None if class_names is None else list(class_names)
        self.model, self.seed, self.through = model, seed, through
        self._target = Target.of(through, inputs, labels, outputs=outputs)
        self._route = EvaluationRoute(self._target)
        self._epoch: int | None = None
        self._clean: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the strategy does not shard the parameters."""
        check_strategy(trainer, "AdversarialExampleLogger", on_all_ranks=False)
        self._route = EvaluationRoute(self._target)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first epoch that the attacked model exists."""
        attacked_model(pl_module, self.model, needs_forward=self.through == "model")

    def _batch_starts(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: Stage,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not batch_idx and not dataloader_idx and shows_pictures(trainer):
            with torch.inference_mode(False):  # so that the copies can be differentiated
                self._clean = map_tensors(batch, torch.clone)  # the step may modify its batch

    def _batch_ends(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        if trainer.sanity_checking:
            self._check_early(trainer, pl_module)
        elif is_due(trainer, self._epoch, self.every_n_epochs):
            self._show(trainer, pl_module, stage, batch_idx, dataloader_idx)

    def _epoch_ends(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        shown = not trainer.sanity_checking and is_due(trainer, self._epoch, self.every_n_epochs)
        if shown and stage == "validation":
            self._epoch = trainer.current_epoch

    def _check_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first epoch, check that every class of the model has a name."""
        batch, self._clean = self._clean, None
        if self.class_names is None or batch is None:
            return
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            attacked_batch = self._attacked_batch(pl_module, "validation", batch, None)
            with attacked_batch.ready():
                ((outputs, _),) = attacked_batch.observe(OUTPUTS, attacked_batch.inputs)
            if attacked_batch.classifies:
                self._check_names(logits_of(outputs).shape[1])

    def _show(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        batch, self._clean = self._clean, None
        if batch_idx or dataloader_idx or batch is None:
            return
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            several = len(batches_of(trainer, stage)) > 1
            attacked_batch = self._attacked_batch(pl_module, stage, batch, dataloader_idx if several else None)
            inputs = attacked_batch.inputs
            if inputs.ndim != 4 or inputs.shape[1] not in (1, 3, 4):
                rank_zero_warn(
                    "AdversarialExampleLogger shows images (N, C, H, W) with 1, 3 or 4 channels; inputs of shape "
                    f"{tuple(inputs.shape)} are not shown."
                )
                return
            shown = torch.arange(min(self.samples, len(inputs)), device=inputs.device)
            generator = evaluation_generator(trainer, self.seed, batch_idx, dataloader_idx, inputs.device)
            if attacked_batch.classifies:
                attacked, captions = self._classified(attacked_batch, shown, generator)
            else:
                attacked, captions = self._by_loss(attacked_batch, shown, generator)
            clean, attacked = inputs.detach()[shown], attacked[shown]
        pictures = side_by_side(self.threat.to_data(clean.float()), self.threat.to_data(attacked.float()), self.threat)
        log_pictures(trainer, f"{PREFIX[stage]}/adversarial_examples", pictures, captions)

    def _attacked_batch(
        self, pl_module: LightningModule, stage: Stage, batch: Any, dataloader_idx: int | None
    ) -> AttackedBatch:
        model = attacked_model(pl_module, self.model, needs_forward=self.through == "model")
        attacked_batch = self._route.attacked_batch(pl_module, model, self.threat, stage, batch, (0, dataloader_idx))
        assert attacked_batch is not None  # the first dataloader's
        return attacked_batch

    def _classified(
        self, attacked_batch: AttackedBatch, shown: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """The adversarial inputs, and a caption for each shown sample."""
        inputs, labels, attack = attacked_batch.inputs, attacked_batch.labels, attacked_batch.fitted(self.attack)
        with attacked_batch.ready():
            attacked = attack(attacked_batch.model, inputs, labels, generator=generator, samples=shown)
            # Whole batches, because not every model accepts a part of a batch.
            (outputs, _), (attacked_outputs, _) = attacked_batch.observe(OUTPUTS, inputs, attacked)
        target = hard_labels(class_labels(labels.detach().clone(), outputs))[shown]
        self._check_names(logits_of(outputs).shape[1])
        before, after = (_classes_and_confidences(each)[: len(shown)] for each in (outputs, attacked_outputs))
        return attacked, [
            f"label {self._class(label)}; clean: {self._class(was)} ({sure:.0%}); attacked: {self._class(now)} ({sure_now:.0%})"
            for label, (was, sure), (now, sure_now) in zip(target.tolist(), before, after, strict=True)
        ]

    def _by_loss(
        self, attacked_batch: AttackedBatch, shown: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """The adversarial inputs, and captions with the loss of the whole batch, for models without classes."""
        assert isinstance(attacked_batch, StepBatch)
        attacked = attacked_batch.attack(self.attack, generator)
        with attacked_batch.ready():
            clean, worst = attacked_batch.loss(attacked_batch.inputs), attacked_batch.loss(attacked)
        return attacked, [f"loss of the batch: {clean:.3g}; attacked: {worst:.3g}"] * len(shown)

    def _class(self, index: int) -> str:
        if index < 0:
            return "no class"  # the model's outputs are not finite
        if self.class_names is None:
            return str(index)
        self._check_names(index + 1)
        return str(self.class_names[index])

    def _check_names(self, classes: int) -> None:
        if self.class_names is not None and len(self.class_names) < classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but there are at least {classes} classes. Give one name for each class, in "
                "the order of the model's outputs."
            )


def side_by_side(clean: Tensor, attacked: Tensor, threat: ThreatModel) -> list[Picture]:
    """One picture per sample: clean | attacked | perturbation. The largest perturbation is drawn as black or white, zero as grey.

    Args:
        clean: clean images ``(N, C, H, W)`` in data units.
        attacked: adversarial images, of the same shape and units.
        threat: its bounds are drawn as black and white. Without bounds, the range of the clean images is.
    """
    low, high = threat.bounds or (float(clean.min()), float(clean.max()))
    delta = attacked - clean
    largest = delta.flatten(1).abs().amax(1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
    panels = [(clean - low) / (high - low), (attacked - low) / (high - low), 0.5 + delta / (2 * largest)]
    factor = max(1, -(-MIN_SIDE // min(clean.shape[2:])))
    enlarged = [F.interpolate(panel.clamp(0, 1), scale_factor=factor, mode="nearest") for panel in panels]
    gap = torch.ones_like(enlarged[0][..., : max(2, factor // 2)])
    rows = torch.cat([enlarged[0], gap, enlarged[1], gap, enlarged[2]], dim=3)[:, :3]
    rows = rows.expand(-1, 3, -1, -1) if rows.shape[1] == 1 else rows
    return list((rows * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8))


def _classes_and_confidences(outputs: Any) -> list[tuple[int, float]]:
    confidence = logits_of(outputs).detach().float().softmax(1).amax(1)
    return list(zip(predictions(outputs).tolist(), confidence.tolist(), strict=True))

"""Pictures of adversarial examples for the loggers that can show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._compat import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_wdefense._strategy import check_strategy
from lightning_wdefense.attacks import Attack, ThreatModel
from lightning_wdefense.attacks.labels import class_labels, hard_labels
from lightning_wdefense.attacks.registry import evaluation_attacks
from lightning_wdefense.callbacks.pictures import Picture, log_pictures, shows_pictures
from lightning_wdefense.callbacks.schedule import evaluation_generator, is_due
from lightning_wdefense.callbacks.support import attacked_model
from lightning_wdefense.modules.batches import Batches, Key
from lightning_wdefense.modules.isolation import isolated
from lightning_wdefense.modules.outputs import logits_of, predictions

MIN_SIDE = 96
"""Smaller images are enlarged by a whole factor, so that they can be looked at."""


class AdversarialExampleLogger(Callback):
    """Logs what an attack does to a few samples: clean, attacked, and the perturbation amplified around grey.

    The first samples of the first validation and test batch are shown, each as one picture under
    ``{stage}/adversarial_examples`` with labels, predictions and confidences in its caption. ``WandbLogger`` shows them as a
    panel, ``TensorBoardLogger`` as images with the captions as text; with other loggers the callback does nothing, and so it does
    with inputs that are not images ``(N, C, H, W)`` of 1, 3 or 4 channels (with a warning).

    Args:
        threat: what the attacker may do.
        attack: a name or an attack; it must stay in the ball.
        samples: how many samples to show.
        every_n_epochs: show them only every so many training epochs (in the first validation always).
        class_names: names of the classes for the captions.
        model: dotted path to the submodule that takes the inputs and returns logits, if not the module itself.
        inputs: position, key or attribute of the inputs in a batch; by default found by convention.
        labels: the same for the labels.
        seed: seeds the attack's noise.

    Raises:
        ValueError: for an unknown or unbounded attack, one made for another threat model, or no samples; in the sanity check, or at the first
            batch, for fewer ``class_names`` than classes.

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
        model: str | None = None,
        inputs: Key = None,
        labels: Key = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("samples", samples), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        (self.attack,) = evaluation_attacks([attack], threat).values()
        self.threat, self.samples, self.every_n_epochs, self.class_names = threat, samples, every_n_epochs, class_names
        self.model, self.seed = model, seed
        self._batches = Batches(inputs, labels)
        self._epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the strategy leaves the model whole."""
        check_strategy(trainer, "AdversarialExampleLogger")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first epoch what is needed only after it."""
        attacked_model(pl_module, self.model)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the first batch."""
        if trainer.sanity_checking:
            self._foresee(trainer, pl_module, batch)
        elif is_due(trainer, self._epoch, self.every_n_epochs):
            self._show(trainer, pl_module, "val", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which epoch was shown."""
        if not trainer.sanity_checking and is_due(trainer, self._epoch, self.every_n_epochs):
            self._epoch = trainer.current_epoch

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the first batch."""
        self._show(trainer, pl_module, "test", batch, batch_idx, dataloader_idx)

    def _foresee(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Before the first epoch, see that the model's classes have names."""
        if self.class_names is None or not shows_pictures(trainer):
            return
        inputs, _ = self._batches.read(batch)
        model = attacked_model(pl_module, self.model)
        with torch.inference_mode(False), trainer.precision_plugin.forward_context(), isolated(model, inputs.device):
            self._check_names(logits_of(model(inputs.detach().clone()[:1])).shape[1])

    def _show(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if batch_idx or dataloader_idx or not shows_pictures(trainer):
            return
        inputs, labels = self._batches.read(batch)
        if inputs.ndim != 4 or inputs.shape[1] not in (1, 3, 4):
            rank_zero_warn(
                f"AdversarialExampleLogger shows images (N, C, H, W) of 1, 3 or 4 channels; inputs of shape {tuple(inputs.shape)} are "
                "not shown."
            )
            return
        shown = torch.arange(min(self.samples, len(inputs)), device=inputs.device)
        model = attacked_model(pl_module, self.model)
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            generator = evaluation_generator(trainer, self.seed, batch_idx, dataloader_idx, inputs.device)
            attacked = self.attack(model, inputs, labels, generator=generator, samples=shown)
            clean = inputs.detach().clone()
            with isolated(model, inputs.device):
                # Whole batches, since not every model takes a part of one; and copies, since it may work in place.
                outputs, attacked_outputs = model(clean.clone()), model(attacked.clone())
                target = hard_labels(class_labels(labels.detach().clone(), outputs))[shown]
                self._check_names(logits_of(outputs).shape[1])
                before, after = (_verdicts(each)[: len(shown)] for each in (outputs, attacked_outputs))
            clean, attacked = clean[shown], attacked[shown]
        captions = [
            f"label {self._class(label)}; clean: {self._class(was)} ({sure:.0%}); attacked: {self._class(now)} ({sure_now:.0%})"
            for label, (was, sure), (now, sure_now) in zip(target.tolist(), before, after, strict=True)
        ]
        pictures = triptychs(self.threat.to_data(clean.float()), self.threat.to_data(attacked.float()), self.threat)
        log_pictures(trainer, f"{stage}/adversarial_examples", pictures, captions)

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
                f"class_names has {len(self.class_names)} names, but there are at least {classes} classes: give one for each class, in the "
                "order of the model's outputs."
            )


def triptychs(clean: Tensor, attacked: Tensor, threat: ThreatModel) -> list[Picture]:
    """One picture a sample: clean | attacked | perturbation, whose largest value is drawn as full contrast around grey.

    Args:
        clean: ``(N, C, H, W)`` in data units.
        attacked: likewise.
        threat: its bounds are black and white; without bounds the clean images' own range.
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


def _verdicts(outputs: Any) -> list[tuple[int, float]]:
    confidence = logits_of(outputs).detach().float().softmax(1).amax(1)
    return list(zip(predictions(outputs).tolist(), confidence.tolist(), strict=True))

"""The callback that says how robust a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import Callback, LightningModule, Trainer, dataloader_suffix, rank_zero_warn
from lightning_wdefense.attacks import Attack, ThreatModel, WorstCase, worst_case
from lightning_wdefense.attacks.isolation import eager, isolated
from lightning_wdefense.attacks.registry import Attacks, evaluation_attacks
from lightning_wdefense.callbacks.batches import Batches, Key
from lightning_wdefense.callbacks.measures import Measures
from lightning_wdefense.callbacks.pictures import log_curve
from lightning_wdefense.callbacks.progress import RichProgress, TqdmProgress, attack_progress
from lightning_wdefense.callbacks.schedule import evaluation_generator, is_due
from lightning_wdefense.callbacks.support import attacked_model, check_strategy
from lightning_wdefense.defenses.recording import OUTPUTS, PENULTIMATE, ForwardRecorder
from lightning_wdefense.metrics import AccuracyCurve


class RobustnessMonitor(Callback):
    """Attacks the validation and test batches of any LightningModule and logs what is left of its accuracy.

    Logged at the end of each epoch, with ``{stage}`` ``val`` or ``test``, on every logger and for ``ModelCheckpoint`` and
    ``EarlyStopping`` to monitor (adversarial training overfits: choose the epoch by ``val/robust_acc``):

    - ``{stage}/clean_acc``; ``{stage}/robust_acc``, the per-sample worst case over all attacks;
    - ``{stage}/robust_acc_{attack}``, what is left after that attack, in the order given;
    - ``{stage}/attack_success``, the share of what was right on clean inputs that the attacks broke;
    - with ``epsilons`` also ``{stage}/auac``, the area under the accuracy curve, and the curve as a picture;
    - ``{stage}/transport_shift``, the Sinkhorn divergence between clean and adversarial features of the attacked samples.

    Several dataloaders are told apart as Lightning does, by ``/dataloader_idx_{i}``. Values are reduced over all ranks.

    Args:
        threat: what the attacker may do.
        attacks: names, attacks, or a mapping from names of your own to them. They run in this order, each only on the
            samples that the ones before left right. PGD is for watching training; no claim of robustness should rest on
            less than ``"autoattack"``.
        every_n_epochs: measure only every so many training epochs (the first validation always); in between the last values are
            logged again, so that monitored keys never go missing (``EarlyStopping`` counts those epochs in its patience).
        max_batches: attack only the first batches of each dataloader.
        epsilons: radii (data units) for the accuracy curve; each costs a run of all attacks on what is left.
        independent: run each attack on every sample that is right on clean inputs, so that ``robust_acc_{attack}``
            is that attack's own.
        features: where the transport shift is measured: ``"penultimate"``, ``"outputs"``, a dotted path, or ``None``
            to leave it out.
        model: dotted path to the submodule that takes the inputs and returns logits, if not the module itself.
        inputs: position, key or attribute of the inputs in a batch; by default found by convention.
        labels: the same for the labels.
        seed: seeds the attacks' noise, the same in every epoch.
        progress: show a progress bar where attacks take more than a few seconds.
        name: tells several monitors apart, in the logs (``{stage}/{name}/...``) and in checkpoints.

    Attributes:
        curves: with ``epsilons``, the last accuracy curves by the keys they were logged under
            (``"val/robustness_curve"``); ``curve.plot(ax, label="mine")`` draws one.

    Raises:
        ValueError: for an unknown attack, one that leaves the ball, one made for another threat model, or two of a name.

    Example:
        >>> from lightning_wdefense import RobustnessMonitor, ThreatModel
        >>> monitor = RobustnessMonitor(ThreatModel(eps=8 / 255), attacks=["pgd"], epsilons=[2 / 255, 8 / 255])
        >>> list(monitor.attacks)
        ['pgd']
    """

    def __init__(
        self,
        threat: ThreatModel,
        attacks: Attacks = ("pgd",),
        *,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        epsilons: Sequence[float] | None = None,
        independent: bool = False,
        features: str | None = PENULTIMATE,
        model: str | None = None,
        inputs: Key = None,
        labels: Key = None,
        seed: int = 0,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, or None for all, got {max_batches}.")
        self.threat, self.attacks = threat, evaluation_attacks(attacks, threat)
        self.every_n_epochs, self.max_batches, self.independent = every_n_epochs, max_batches, independent
        self.epsilons = None if epsilons is None else (0.0, *sorted({float(eps) for eps in epsilons} - {0.0}))
        self.features, self.model, self.seed, self.progress, self.name = features, model, seed, progress, name
        self._batches = Batches(inputs, labels)
        self.curves: dict[str, AccuracyCurve] = {}
        self._measures: dict[int, Measures] = {}
        self._last: dict[str, dict[str, float]] = {}
        self._epoch: int | None = None
        self._bar: TqdmProgress | RichProgress | None = None
        self._new_measures()  # names and radii that the metrics refuse are an error now, not after an epoch

    @property
    def state_key(self) -> str:
        """Identifies the callback in a checkpoint: by ``name`` alone."""
        return f"RobustnessMonitor({self.name!r})"

    def state_dict(self) -> dict[str, Any]:
        """The last values, which a resumed run logs on epochs that are not measured, and the epoch they are of."""
        return {"last": self._last, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last values back."""
        self._last, self._epoch = dict(state_dict["last"]), state_dict["epoch"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check early that the strategy leaves the model whole."""
        check_strategy(trainer, "RobustnessMonitor")

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
        """Attack the batch."""
        self._attack(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack the batch."""
        self._attack(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured."""
        self._finish(trainer, pl_module, "val", trainer.num_val_batches)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was measured."""
        self._finish(trainer, pl_module, "test", trainer.num_test_batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the progress bar and drop what was half measured."""
        self._close()

    def _start(self, trainer: Trainer, pl_module: LightningModule, num_batches: Sequence[float]) -> None:
        self._close()
        if trainer.sanity_checking or not is_due(trainer, self._epoch, self.every_n_epochs):
            return
        self._recorder(attacked_model(pl_module, self.model))
        limit = float("inf") if self.max_batches is None else self.max_batches
        runs = len(self.attacks) * (1 + len(set(self.epsilons or ()) - {0.0, self.threat.eps}))
        total = sum(min(limit, batches) for batches in num_batches) * runs
        self._bar = attack_progress(trainer, total, show=self.progress)

    def _attack(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._bar is None or (self.max_batches is not None and batch_idx >= self.max_batches):
            return
        inputs, labels = self._batches.read(batch)
        model = attacked_model(pl_module, self.model)

        def run(attacks: Mapping[str, Attack], **options: Any) -> WorstCase:
            return worst_case(
                model,
                attacks,
                inputs,
                labels,
                generator=lambda: evaluation_generator(trainer, self.seed, batch_idx, dataloader_idx, inputs.device),
                on_attack=self._show,
                **options,
            )

        # Evaluation loops run under inference_mode, where even a metric's state could not be used again.
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            if dataloader_idx not in self._measures:
                self._measures[dataloader_idx] = self._new_measures().to(inputs.device)
            measures = self._measures[dataloader_idx]
            result = run(self.attacks, independent=self.independent)
            measures.accuracy.update(result.clean, result.adversarial, result.labels)
            measures.success.update(result.clean, result.worst, result.labels)
            if measures.curve is not None:
                measures.curve.update(self._curve(run, result), result.labels)
            if measures.shift is not None and result.attacked.any():
                clean, attacked = self._shifted(model, inputs, result)
                # A model that diverged has no features to measure; that is no reason to end its run.
                finite = clean.isfinite().all(1) & attacked.isfinite().all(1)
                if finite.any():
                    measures.shift.update(clean[finite], attacked[finite])

    def _show(self, attack: str, left: Tensor) -> None:
        assert self._bar is not None
        self._bar.advance(f"{attack}: {int(left.sum())}/{len(left)} left in the batch")

    def _curve(self, run: Callable[..., WorstCase], result: WorstCase) -> list[Tensor]:
        """Predicted classes at every eps, each attacked only where the smaller ones left it right."""
        assert self.epsilons is not None
        predicted = [result.clean]
        for eps in self.epsilons[1:]:
            left = predicted[-1] == result.labels
            if eps == self.threat.eps:
                found = result
            else:
                attacks = {name: attack.with_eps(eps) for name, attack in self.attacks.items()}
                found = run(attacks, samples=left.flatten(1).any(1) if left.ndim > 1 else left)
            predicted.append(torch.where(left, found.worst, predicted[-1]))
        return predicted

    def _shifted(self, model: nn.Module, inputs: Tensor, result: WorstCase) -> tuple[Tensor, Tensor]:
        assert self.features is not None
        attacked = inputs.detach().clone()[result.attacked]
        try:
            recorder = self._recorder(model)
            recorder.attach(attacked, temporary=True)
        except ValueError:
            if self.features != PENULTIMATE:
                raise
            rank_zero_warn("The model runs no nn.Linear, so the transport shift is measured on its outputs.")
            self.features = OUTPUTS
            return self._shifted(model, inputs, result)
        try:
            with isolated(model, inputs.device), eager():
                seen = [recorder.see(batch) for batch in (attacked, result.inputs[result.attacked])]
        finally:
            recorder.detach()
        return seen[0], seen[1]

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str, num_batches: Sequence[float]) -> None:
        if trainer.sanity_checking:
            return
        if self._bar is not None:
            prefix = f"{stage}/{self.name}/" if self.name else f"{stage}/"
            values: dict[str, float] = {}
            for index in range(len(num_batches)):
                # Every rank takes part in the reduction, also one whose share of the data was empty.
                measures = self._measures.get(index) or self._new_measures().to(pl_module.device)
                suffix = dataloader_suffix(index) if len(num_batches) > 1 else ""
                measured, curve = measures.compute()
                values |= {prefix + key + suffix: value for key, value in measured.items()}
                if curve is not None:
                    self.curves[prefix + "robustness_curve" + suffix] = curve
                    log_curve(trainer, prefix + "robustness_curve" + suffix, curve)
            self._last[stage] = values
            if stage == "val":
                self._epoch = trainer.current_epoch
            self._close()
        # The values are the same on every rank already; sync_dist only keeps Lightning from warning that they are not.
        pl_module.log_dict(self._last[stage], sync_dist=True, add_dataloader_idx=False)

    def _recorder(self, model: nn.Module) -> ForwardRecorder:
        return ForwardRecorder(model, OUTPUTS if self.features is None else self.features)

    def _new_measures(self) -> Measures:
        return Measures.of(tuple(self.attacks), self.epsilons, shift=self.features is not None)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._measures = None, {}

"""The callback that says how robust a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._compat import Trainer, rank_zero_warn
from lightning_wdefense.attacks import Attack, ThreatModel, WorstCase, worst_case
from lightning_wdefense.attacks.registry import Attacks, evaluation_attacks
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.callbacks.evaluation.attacked_batch import AttackedBatch, StepBatch
from lightning_wdefense.callbacks.evaluation.base import EvaluationMonitor, Noise
from lightning_wdefense.callbacks.evaluation.measures import Measures
from lightning_wdefense.callbacks.evaluation.pictures import log_curve
from lightning_wdefense.callbacks.target import Through
from lightning_wdefense.metrics import AccuracyCurve, TransportShift
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick
from lightning_wdefense.modules.recording import PENULTIMATE


class RobustnessMonitor(EvaluationMonitor[Measures]):
    """Attacks the validation and test batches of any LightningModule and logs what is left of its accuracy.

    Logged at the end of each epoch, with ``{stage}`` ``val`` or ``test``, on every logger and for ``ModelCheckpoint`` and
    ``EarlyStopping`` to monitor (adversarial training overfits: choose the epoch by ``val/robust_acc``):

    - ``robust/{key}``, for each key that the module's own ``validation_step`` or ``test_step`` logs (and its hooks at the end of the batch and of
      the epoch): the same metric, of the attacked batches: ``self.log("val_acc", ...)`` gives ``robust/val_acc``;
    - ``{stage}/clean_acc``; ``{stage}/robust_acc``, the per-sample worst case over all attacks;
    - ``{stage}/robust_acc_{attack}``, what is left after that attack, in the order given;
    - ``{stage}/attack_success``, the share of what was right on clean inputs that the attacks broke;
    - with ``epsilons`` also ``{stage}/auac``, the area under the accuracy curve, and the curve as a picture;
    - ``{stage}/transport_shift``, the Sinkhorn divergence between clean and adversarial features of the attacked samples.

    Accuracies are logged where the labels were seen to be classes of the outputs: by the module's own loss, at the first batch (in the sanity
    check). Elsewhere the loss of the module's own step is attacked, and ``{stage}/clean_loss``, ``{stage}/robust_loss`` and
    ``{stage}/robust_loss_{attack}`` stand in their place.

    Several dataloaders are told apart as Lightning does, by ``/dataloader_idx_{i}``. Values are reduced over all ranks.

    Args:
        threat: what the attacker may do.
        attacks: names, attacks, or a mapping from names of your own to them. They run in this order, each only on the
            samples that the ones before left right (the first, if it follows gradients, on all, for the sake of metrics other than
            accuracy). PGD is for watching training; no claim of robustness should rest on
            less than ``"autoattack"``.
        every_n_epochs: measure only every so many training epochs (the first validation always); in between the last values are
            logged again, so that monitored keys never go missing (``EarlyStopping`` counts those epochs in its patience).
        max_batches: attack only the first batches of each dataloader.
        epsilons: radii (data units) for the accuracy curve; each costs a run of all attacks on what is left.
        independent: run each attack on every sample that is right on clean inputs, so that ``robust_acc_{attack}``
            is that attack's own.
        ignore_index: label of pixels that count for nothing, such as 255; beside it, -100 always is.
        features: where the transport shift is measured: ``"penultimate"``, ``"outputs"``, a dotted path, or ``None``
            to leave it out.
        through: ``"model"`` attacks by plain forward passes; ``"step"`` through the module's own step, whatever that does with the batch;
            ``"auto"`` takes the first where a look at the first batch shows that both compute the same, else the second.
        perturb: dotted path to a submodule, or a :class:`~lightning_wdefense.attacks.Perturb`, whose output is attacked in place of the
            inputs.
        model: dotted path to the submodule that takes the inputs and returns logits, if not the module itself.
        inputs: where the inputs are in a batch: a position, key or attribute, a path (``"image.pixels"``, ``(0, 1)``), a list of several,
            or a callable that gets and sets them; by default found by convention.
        labels: the same for the labels.
        outputs: key, position or callable that finds the logits in what the model returns; ``"logits"`` and ``"out"`` are found.
        dataloaders: indices of the dataloaders whose batches are attacked; by default all that can be, the others with a warning.
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

    evaluates_again = True

    def __init__(
        self,
        threat: ThreatModel,
        attacks: Attacks = ("pgd",),
        *,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
        epsilons: Sequence[float] | None = None,
        independent: bool = False,
        ignore_index: int | None = None,
        features: str | None = PENULTIMATE,
        through: Through = "auto",
        perturb: str | Perturb | None = None,
        model: str | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
        outputs: Pick = None,
        dataloaders: Sequence[int] | None = None,
        seed: int = 0,
        progress: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            max_batches=max_batches,
            features=features,
            model=model,
            through=through,
            perturb=perturb,
            inputs=inputs,
            labels=labels,
            outputs=outputs,
            ignore_index=ignore_index,
            dataloaders=dataloaders,
            seed=seed,
            progress=progress,
            name=name,
        )
        self.threat, self.attacks, self.independent = threat, evaluation_attacks(attacks, threat), independent
        self.epsilons = None if epsilons is None else (0.0, *sorted({float(eps) for eps in epsilons} - {0.0}))
        self.attacks_a_batch = len(self.attacks) * (1 + len(set(self.epsilons or ()) - {0.0, threat.eps}))
        self.curves: dict[str, AccuracyCurve] = {}
        self.new_measures(
            torch.device("cpu")
        )  # names and radii that the metrics refuse are an error now, not after an epoch

    def new_measures(self, device: torch.device) -> Measures:
        """Fresh metrics for one dataloader."""
        return Measures.of(tuple(self.attacks), self.epsilons, shift=self.features is not None).to(device)

    @property
    def _threat(self) -> ThreatModel:
        return self.threat

    def check(self, attacked_batch: AttackedBatch) -> None:
        """Refuse attacks that need a classifier where there is none.

        Raises:
            ValueError: naming them.
        """
        if attacked_batch.classifies:
            return
        for name, attack in self.attacks.items():
            if attack.of_losses() is None and not (
                callable(getattr(attack, "loss", None)) and attacked_batch.has_outputs
            ):
                raise ValueError(
                    f"The attack {name!r} reads logits, and the labels of the batch are not seen to be classes of the outputs (measured: the loss "
                    'does not fall in the logit of the own class): attack the loss of the step with attacks=["pgd"], or say where the logits are '
                    'with outputs= or model=, and through="model" for a plain pass of it.'
                )
        if self.epsilons is not None:
            rank_zero_warn("epsilons= draws the curve of an accuracy; for the loss of this step it is left out.")

    def measure(self, measures: Measures, attacked_batch: AttackedBatch, noise: Noise) -> Tensor:
        """Attack the batch."""
        if isinstance(attacked_batch, StepBatch) and not attacked_batch.classifies:
            return self._measure_loss(measures, attacked_batch, noise)

        def run(attacks: Mapping[str, Attack], **options: Any) -> WorstCase:
            options |= {"ignore_index": self.ignore_index, "generator": noise, "on_attack": self.show}
            fitted = {name: attacked_batch.fitted(attack) for name, attack in attacks.items()}
            return worst_case(attacked_batch.model, fitted, attacked_batch.inputs, attacked_batch.labels, **options)

        # The module's own metrics may be others than accuracy, so samples that were wrong before are moved as well.
        by_gradient = next(iter(self.attacks.values())).of_losses() is not None
        result = run(self.attacks, independent=self.independent, everyone=by_gradient)
        measures.classified.update(len(result.labels))
        measures.accuracy.update(result.clean, result.adversarial, result.labels)
        measures.success.update(result.clean, result.worst, result.labels)
        if measures.curve is not None:
            measures.curve.update(self._curve(run, result), result.labels)
        if measures.shift is not None and result.attacked.any():
            # The whole batch, since not every model takes a part of one.
            (_, clean), (_, moved) = self.observe(attacked_batch, attacked_batch.inputs, result.inputs)
            clean, moved = clean[result.attacked], moved[result.attacked]
            self._add_shift(measures.shift, clean, moved)
        return result.inputs

    def _measure_loss(self, measures: Measures, attacked_batch: StepBatch, noise: Noise) -> Tensor:
        """Attack the step's own loss, which is one for the whole batch: the attack that raises it most counts."""
        size = attacked_batch.site.size
        clean = attacked_batch.loss(attacked_batch.inputs)
        measures.attacked.update(size)
        measures.losses["clean_loss"].update(clean * size)
        worst, largest = attacked_batch.inputs, clean
        for name, attack in self.attacks.items():
            found = attacked_batch.attack(attack, noise())
            loss = attacked_batch.loss(found)
            measures.losses[f"robust_loss_{name}"].update(loss * size)
            if not loss <= largest:
                worst, largest = found, loss
            assert self._bar is not None
            self._bar.advance(f"{name}: loss {clean:.3g} to {loss:.3g}")
        measures.losses["robust_loss"].update(largest * size)
        if measures.shift is not None:
            (_, before), (_, after) = self.observe(attacked_batch, attacked_batch.inputs, worst)
            self._add_shift(measures.shift, before, after)
        return worst

    def _add_shift(self, shift: TransportShift, clean: Tensor, moved: Tensor) -> None:
        # A model that diverged has no features to measure; that is no reason to end its run.
        if len(clean) != len(moved):
            return
        finite = clean.isfinite().all(1) & moved.isfinite().all(1)
        if finite.any():
            shift.update(clean[finite], moved[finite])

    def compute(self, measures: Measures, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """The metrics' values; also draws the curve."""
        values, curve = measures.compute()
        if curve is not None:
            self.curves[key("robustness_curve")] = curve
            log_curve(trainer, key("robustness_curve"), curve)
        return values

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

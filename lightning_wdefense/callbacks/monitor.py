"""The callback that measures robust accuracy in validation and test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_wdefense._compat import Trainer, rank_zero_warn
from lightning_wdefense.attacks import Attack, MinimalAttack, ThreatModel
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.callbacks.evaluation.base import EvaluationMonitor
from lightning_wdefense.callbacks.evaluation.pictures import log_curve
from lightning_wdefense.callbacks.evaluation.tables import (
    BY_ATTACK,
    BY_CLASS,
    BY_EPS,
    log_table,
    rows_by_attack,
    rows_by_class,
    rows_by_eps,
    shows_tables,
)
from lightning_wdefense.callbacks.target import Through
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch, StepBatch
from lightning_wdefense.evaluation.details.classes import ClassCount
from lightning_wdefense.evaluation.measures import Measures
from lightning_wdefense.evaluation.protocol import EvaluationProtocol, Noise
from lightning_wdefense.metrics import AccuracyCurve
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick
from lightning_wdefense.modules.recording import PENULTIMATE


class RobustnessMonitor(EvaluationMonitor[Measures]):
    """Attacks the validation and test batches of any LightningModule and logs the robust accuracy.

    Values are logged at the end of each epoch on every logger, where ``{stage}`` is ``val`` or ``test``. ``ModelCheckpoint`` and
    ``EarlyStopping`` can monitor them. Adversarial training overfits, so choose the epoch by ``val/robust_acc``.

    - ``robust/{key}``: the module's own metrics on the attacked batches. There is one for each key that ``validation_step`` or
      ``test_step`` and the hooks at the end of a batch and of the epoch log: ``self.log("val_acc", ...)`` gives ``robust/val_acc``;
    - ``{stage}/clean_acc``: accuracy on clean inputs;
    - ``{stage}/robust_acc``: robust accuracy, the per-sample worst case over all attacks;
    - ``{stage}/robust_acc_{attack}``: accuracy that is left after that attack, in the given order;
    - ``{stage}/attack_success``: share of the samples classified correctly on clean inputs that the attacks made wrong;
    - ``{stage}/auac``: with ``epsilons`` or ``distances``, the area under the accuracy curve; the curve is logged as a picture;
    - ``{stage}/median_distance``: with ``distances``, the median distance to the decision boundary (data units);
    - ``{stage}/distributional_acc``: with ``distances``, the accuracy that is left by the best adversary who moves the distribution of
      the inputs by a Wasserstein distance of eps, see :class:`~lightning_wdefense.metrics.DistributionalAccuracy`;
    - ``{stage}/transport_shift``: Sinkhorn divergence between clean and adversarial features of the attacked samples.

    W&B also gets tables, the same in every run: ``{stage}/robustness_by_attack``, ``{stage}/robustness_by_class`` and, with a curve,
    ``{stage}/robustness_by_eps``, each with the epoch and 95% intervals. TensorBoard gets them as text.

    Accuracies are logged if the labels are classes of the outputs. The monitor tests this with the module's own loss, on the first
    batch (in the sanity check). Otherwise the attacks maximise the loss of the module's own step, and ``{stage}/clean_loss``,
    ``{stage}/robust_loss`` and ``{stage}/robust_loss_{attack}`` are logged instead of accuracies.

    With several dataloaders the keys end in ``/dataloader_idx_{i}``, as Lightning's do. Values are reduced over all ranks.

    Args:
        threat: the threat model: norm, perturbation budget eps (data units) and bounds.
        attacks: names, attacks, or a mapping from your own names to attacks. They run in this order, each only on the samples that
            are still classified correctly. If the first attack uses gradients, it runs on all samples, for metrics other than
            accuracy. PGD is enough to watch training; a claim of robustness needs at least ``"autoattack"``.
        every_n_epochs: measure every ``n`` training epochs, starting with the first validation. In the epochs between, the last
            values are logged again, so that monitored keys always exist (``EarlyStopping`` counts these epochs in its patience).
        max_batches: attack only the first ``max_batches`` batches of each dataloader.
        epsilons: values of eps (data units) for the accuracy curve. Each value costs one run of all attacks on the samples that are
            still classified correctly, unless ``distances`` is given.
        distances: a minimum-norm attack, such as ``"fmn"``, or ``FMN(threat, targets=4)`` for claims. One run of it gives the distance
            of each sample to the decision boundary, and with it the whole accuracy curve (at ``epsilons``, or at 21 values up to eps),
            the median distance and the distributional accuracy. What the attacks found counts as well.
        p: order of the Wasserstein distance of the distributional accuracy, from 1 to infinity.
        independent: run each attack on every sample that is classified correctly on clean inputs. Then ``robust_acc_{attack}``
            does not depend on the other attacks.
        ignore_index: label of pixels that are left out, such as 255. Pixels with label -100 are always left out.
        features: where the transport shift is measured: ``"penultimate"``, ``"outputs"``, a dotted path to a submodule, or ``None``
            for no transport shift.
        through: how the attacks run the model. ``"model"``: by plain forward passes. ``"step"``: through the module's own step.
            ``"auto"``: ``"model"`` if an inspection of the first batch shows that both compute the same, otherwise ``"step"``.
        perturb: dotted path to a submodule, or a :class:`~lightning_wdefense.attacks.Perturb`. The attacks perturb the output of
            this submodule instead of the inputs.
        model: dotted path to the submodule that takes the inputs and returns logits, if it is not the module itself.
        inputs: where the inputs are in a batch: a position, key or attribute, a path (``"image.pixels"``, ``(0, 1)``), a list of
            several of these, or a callable that gets and sets the inputs. By default they are found by convention.
        labels: the same for the labels.
        outputs: key, position or callable that finds the logits in the model's return value. ``"logits"`` and ``"out"`` are found
            without it.
        dataloaders: indices of the dataloaders whose batches are attacked. By default every dataloader that can be attacked; the
            monitor warns of the others.
        seed: seed of the attacks' noise, which is the same in every epoch.
        progress: show a progress bar if the attacks take more than a few seconds.
        name: distinguishes several monitors, in the logs (``{stage}/{name}/...``) and in checkpoints.

    Attributes:
        protocol: what is measured: the threat model, the attacks by name, and the values of eps.
        curves: with ``epsilons``, the last accuracy curves by the keys under which they were logged
            (``"val/robustness_curve"``); ``curve.plot(ax, label="mine")`` draws one.

    Raises:
        ValueError: if an attack is unknown, is unbounded (may leave the eps ball), or was made for another threat model, or if two
            attacks have the same name.

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
        distances: str | MinimalAttack | None = None,
        p: float = 2.0,
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
        self.protocol = EvaluationProtocol.of(
            threat,
            attacks,
            epsilons=epsilons,
            independent=independent,
            ignore_index=ignore_index,
            features=features,
            distances=distances,
            p=p,
        )
        self.attacks_a_batch = self.protocol.attacks_a_batch
        self.curves: dict[str, AccuracyCurve] = {}

    @property
    def threat(self) -> ThreatModel:
        """The threat model."""
        return self.protocol.threat

    @property
    def attacks(self) -> Mapping[str, Attack]:
        """The attacks, by name."""
        return self.protocol.attacks

    def new_measures(self, device: torch.device) -> Measures:
        """New, empty metrics for one dataloader."""
        return self.protocol.new_measures(device)

    def _attacks(self) -> Iterable[Attack]:
        return self.attacks.values()

    @property
    def _threat(self) -> ThreatModel:
        return self.threat

    def check(self, attacked_batch: AttackedBatch) -> None:
        """Raise an error if an attack needs logits and the batch has none.

        Raises:
            ValueError: if an attack needs logits; the message names the attack.
        """
        if attacked_batch.classifies:
            return
        for name, attack in self.attacks.items():
            if attack.of_losses() is None and not (
                callable(getattr(attack, "loss", None)) and attacked_batch.has_outputs
            ):
                raise ValueError(
                    f"The attack {name!r} needs logits, but the labels of the batch do not appear to be classes of the model's outputs (the loss "
                    "does not decrease when the logit of the label's class grows). Attack the loss of the step with "
                    'attacks=["pgd"], or say where the logits are with outputs= or model=, and set through="model" for plain forward passes.'
                )
        if self.protocol.epsilons is not None:
            rank_zero_warn(
                "epsilons= or distances= asks for an accuracy curve, but this step has a loss and no accuracy: no curve is logged."
            )

    def measure(self, measures: Measures, attacked_batch: AttackedBatch, noise: Noise) -> Tensor:
        """Attack the batch and update the metrics."""
        if isinstance(attacked_batch, StepBatch) and not attacked_batch.classifies:
            return self._measure_loss(measures, attacked_batch, noise)
        return self.protocol.measure(measures, attacked_batch, noise, self.show).worst_case.inputs

    def _measure_loss(self, measures: Measures, attacked_batch: StepBatch, noise: Noise) -> Tensor:
        """Attack the step's own loss. There is one loss for the whole batch, so the attack with the largest loss is the worst case."""
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
            measures.add_shift(before, after)
        return worst

    def compute(self, measures: Measures, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """Values of the metrics; also logs the accuracy curve, and tables."""
        values, curve = self.protocol.compute(measures)
        if curve is not None:
            self.curves[key("robustness_curve")] = curve
            log_curve(trainer, key("robustness_curve"), curve)
        if "robust_acc" in values:
            found = measures.classes.compute()  # on every rank, since it is reduced over them
            if shows_tables(trainer):
                self._log_tables(trainer, key, values, curve, found)
        return values

    def _log_tables(
        self,
        trainer: Trainer,
        key: Callable[[str], str],
        values: dict[str, float],
        curve: AccuracyCurve | None,
        found: ClassCount,
    ) -> None:
        epoch = trainer.current_epoch
        by_attack = rows_by_attack(epoch, values, tuple(self.attacks), found.samples)
        log_table(trainer, key("robustness_by_attack"), BY_ATTACK, by_attack)
        log_table(trainer, key("robustness_by_class"), BY_CLASS, rows_by_class(epoch, found))
        if curve is not None:
            log_table(trainer, key("robustness_by_eps"), BY_EPS, rows_by_eps(epoch, curve, found.samples))

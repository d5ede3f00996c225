"""The callback that measures how well detectors find attacked samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.metric import jit_distributed_available
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_wdefense._compat import Trainer, rank_zero_warn
from lightning_wdefense._names import resolved
from lightning_wdefense.attacks import Attack, ThreatModel, worst_case
from lightning_wdefense.attacks.registry import evaluation_attacks
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.callbacks.evaluation.base import EvaluationMonitor
from lightning_wdefense.callbacks.target import Through
from lightning_wdefense.detection import DETECTORS, CriticScore, Detector, FeatureSqueezing, get_detector
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch
from lightning_wdefense.evaluation.protocol import Noise
from lightning_wdefense.metrics import AUROC, Detectability
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, logits_of
from lightning_wdefense.modules.recording import PENULTIMATE

Detectors = Sequence[str | Detector] | Mapping[str, str | Detector]
"""Several detectors: names, detectors, or a mapping from your own names to either."""

PART = 1024
"""Number of samples that a detector scores at once."""


class Samples:
    """Outputs, features and labels of some samples, collected batch by batch."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {"outputs": [], "features": [], "labels": []}

    def add(self, outputs: Tensor, features: Tensor, labels: Tensor) -> None:
        """Add logits ``(N, K)``, features ``(N, D)`` and classes ``(N,)`` of ``N`` samples."""
        # The features of a diverged model cannot be measured, but the run should go on.
        finite = outputs.isfinite().all(1) & features.isfinite().all(1)
        if finite.any():
            for part, values in (("outputs", outputs), ("features", features), ("labels", labels.unsqueeze(1))):
                self.parts[part].append(values[finite].detach())

    def read(self, part: str) -> Tensor | None:
        """All rows of one part (``"outputs"``, ``"features"`` or ``"labels"``), ``(N, D)``; ``None`` if there are none."""
        return torch.cat(self.parts[part]) if self.parts[part] else None


class DetectionMeasures:
    """The samples of one dataloader: clean samples to fit detectors, and clean and attacked samples to evaluate them.

    For detectors that read inputs only the scores are kept, in ``metrics``; the inputs are not.
    """

    def __init__(self, detectors: Iterable[str], device: torch.device) -> None:
        self.samples = 0
        self.learn, self.clean, self.attacked = Samples(), Samples(), Samples()
        self.metrics = {name: Detectability().to(device) for name in detectors}


class DetectionMonitor(EvaluationMonitor[DetectionMeasures]):
    """Attacks validation and test batches of any LightningModule and logs how well detectors find the attacked samples.

    Logged at the end of each epoch, where ``{stage}`` is ``val`` or ``test``: ``{stage}/auroc_{detector}``, the area under the ROC
    curve. The negatives are clean samples that are classified correctly; the positives are those samples after an attack that made
    them wrong. A value of 0.5 is chance. It is NaN if the attack made no sample wrong.

    The clean features of every second sample fit the detectors; the other samples are attacked and scored. So no detector is
    evaluated on samples that it was fitted to. Batches should be shuffled. The attack does not know the detectors: a high AUROC does
    not show that a detector withstands an adaptive attack.

    With several dataloaders the keys end in ``/dataloader_idx_{i}``, as Lightning's do. With several ranks the detectors are fitted
    to the samples of all ranks. The features of all samples are kept in memory until the end of the epoch, see ``max_batches``.

    Args:
        threat: the threat model: norm, perturbation budget eps (data units) and bounds.
        attack: a name or an attack. It must be bounded, that is, never leave the eps ball.
        detectors: names, detectors, or a mapping from your own names to them. Besides the default ones there are ``"mahalanobis"``
            (needs scikit-learn, ``pip install "lightning-wdefense[detection]"``) and, for inputs within bounds,
            ``"feature-squeezing"``. A detector of your own that reads inputs must already be fitted, because inputs are not kept.
        features: the features for detectors that read features: ``"penultimate"`` (the input of the last linear layer that runs),
            ``"outputs"``, or a dotted path to a submodule of the model.
        every_n_epochs: measure every ``n`` training epochs, starting with the first validation. In the epochs between, the last
            values are logged again.
        max_batches: measure only the first ``max_batches`` batches of each dataloader.
        model: dotted path to the submodule that takes the inputs and returns logits, if it is not the module itself.
        through: as for :class:`RobustnessMonitor`, like the next four arguments.
        perturb: the submodule whose output is attacked instead of the inputs.
        inputs: where the inputs are in a batch.
        labels: the same for the labels.
        outputs: where the logits are in the model's return value.
        dataloaders: indices of the dataloaders whose batches are attacked.
        seed: seed of the attack's noise, which is the same in every epoch.
        progress: show a progress bar if the attack takes more than a few seconds.
        name: distinguishes several monitors, in the logs (``{stage}/{name}/...``) and in checkpoints.

    Attributes:
        aurocs: the last values with their bootstrap intervals, by the keys under which they were logged.

    Raises:
        ValueError: if a detector or the attack is unknown, the attack is unbounded, two detectors have the same name, or a detector
            that reads inputs is not fitted.
        TypeError: if an entry is neither a name nor a detector.

    Example:
        >>> from lightning_wdefense import DetectionMonitor, ThreatModel
        >>> monitor = DetectionMonitor(ThreatModel(eps=8 / 255), detectors=["energy", "knn"])
        >>> list(monitor.detectors)
        ['energy', 'knn']
    """

    def __init__(
        self,
        threat: ThreatModel,
        attack: str | Attack = "pgd",
        detectors: Detectors = ("max-softmax", "energy", "knn", "lid", "kernel-density"),
        *,
        features: str = PENULTIMATE,
        every_n_epochs: int = 1,
        max_batches: int | None = None,
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
            dataloaders=dataloaders,
            seed=seed,
            progress=progress,
            name=name,
        )
        self.threat, self.attack = threat, evaluation_attacks([attack], threat)
        self.detectors = named_detectors(detectors, threat)
        self.aurocs: dict[str, AUROC] = {}

    def new_measures(self, device: torch.device) -> DetectionMeasures:
        """Empty measures for one dataloader."""
        return DetectionMeasures(self.detectors, device)

    def _attacks(self) -> Iterable[Attack]:
        return self.attack.values()

    @property
    def _threat(self) -> ThreatModel:
        return self.threat

    def check(self, attacked_batch: AttackedBatch) -> None:
        """Raise an error if the labels of the batch are not classes of the outputs.

        Raises:
            ValueError: if they are not.
        """
        if not attacked_batch.classifies:
            raise ValueError(
                "DetectionMonitor needs a classifier, but the labels of the batch do not appear to be classes of the model's outputs. Say where the "
                'logits are with outputs= or model=, and set through="model" for plain forward passes.'
            )

    def measure(self, measures: DetectionMeasures, attacked_batch: AttackedBatch, noise: Noise) -> None:
        """Attack every second sample, and keep the outputs and features that the detectors read."""
        inputs, labels, model = attacked_batch.inputs, attacked_batch.labels, attacked_batch.model
        scored = (torch.arange(len(inputs), device=inputs.device) + measures.samples) % 2 == 1
        measures.samples += len(inputs)
        attacks = {name: attacked_batch.fitted(attack) for name, attack in self.attack.items()}
        result = worst_case(model, attacks, inputs, labels, samples=scored, generator=noise, on_attack=self.show)
        if result.labels.ndim > 1:
            raise ValueError(
                f"DetectionMonitor needs samples of one class each, (N,), but the labels have shape {tuple(result.labels.shape)}. Leave the "
                "callback out for tasks with several labels per sample."
            )
        (predicted,) = result.adversarial.values()
        right, broken = result.attacked, result.attacked & (predicted != result.labels)
        clean = inputs.detach().clone()
        # Whole batches, because not every model accepts a part of a batch.
        before, after = self.observe(attacked_batch, clean, result.inputs)
        for samples, (outputs, features), mask in (
            (measures.learn, before, ~scored),
            (measures.clean, before, right),
            (measures.attacked, after, broken),
        ):
            samples.add(logits_of(outputs).detach()[mask], features[mask], result.labels[mask])
        for name, detector in self.detectors.items():
            if detector.reads == "inputs":
                bound = detector.of_model(model)
                parts = (clean[right], result.inputs[broken])
                sides = [bound.score(part) if len(part) else clean.new_empty(0) for part in parts]
                measures.metrics[name].update(*(scores[scores.isfinite()] for scores in sides))

    def compute(self, measures: DetectionMeasures, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """Fit the detectors, and compute their AUROC."""
        values: dict[str, float] = {}
        # The metrics' own tensors were not created under inference_mode either.
        with torch.inference_mode(False), torch.no_grad():
            for name, detector in self.detectors.items():
                metric, short = measures.metrics[name], f"auroc_{name}"
                if detector.reads != "inputs":
                    metric.update(*self._scores(name, detector, measures, metric.device))
                self.aurocs[key(short)] = metric.compute()
                values[short] = float(self.aurocs[key(short)].value)
        return values

    def _scores(self, name: str, detector: Detector, measures: DetectionMeasures, device: torch.device) -> list[Tensor]:
        """Scores of the clean and of the attacked samples of this rank; empty if the detector could not be fitted."""
        none = [torch.empty(0, device=device)] * 2
        if detector.learns:
            features, labels = (gather_rows(measures.learn.read(part), device) for part in (detector.reads, "labels"))
            try:
                detector = copy.copy(detector).fit(features, labels.flatten().long())
            except ValueError as error:
                # A collapsed model or a rare class should not end the run.
                rank_zero_warn(f"The detector {name!r} could not be fitted, so its AUROC is NaN. {error}")
                return none
        sides = [measures.clean.read(detector.reads), measures.attacked.read(detector.reads)]
        return [
            empty if side is None else torch.cat([detector.score(part) for part in side.split(PART)])
            for side, empty in zip(sides, none, strict=True)
        ]


def gather_rows(rows: Tensor | None, device: torch.device) -> Tensor:
    """Rows ``(N, D)`` of all ranks; a rank may have none. If no rank has rows, the result is ``(0, 1)``."""
    if jit_distributed_available():
        width = torch.tensor(0 if rows is None else rows.shape[1], device=device)
        width = torch.stack(gather_all_tensors(width)).max()
        # Flat, because a rank without rows contributes an empty vector.
        flat = torch.empty(0, device=device) if rows is None else rows.float().flatten()
        return torch.cat(gather_all_tensors(flat)).reshape(-1, max(int(width), 1))
    return torch.empty(0, 1, device=device) if rows is None else rows


def named_detectors(detectors: Detectors, threat: ThreatModel) -> dict[str, Detector]:
    """Detectors by name.

    Raises:
        TypeError: if an entry is neither a name nor a detector.
        ValueError: if a name is unknown or repeated, there is no detector, or one that reads inputs is not fitted.
    """

    def make(name: str) -> Detector:
        if DETECTORS.get(name) is CriticScore:
            raise ValueError(
                "The detector 'critic' needs a trained critic: give CriticScore(critic) instead of the name."
            )
        return get_detector(name, **({"threat": threat} if DETECTORS.get(name) is FeatureSqueezing else {}))

    found = resolved("detectors", Detector, detectors, make, example="energy")  # type: ignore[type-abstract]
    for name, detector in found.items():
        if detector.reads == "inputs" and not detector.ready:
            raise ValueError(
                f"The detector {name!r} must be fitted to inputs, which DetectionMonitor does not keep. Fit the detector first."
            )
    return found

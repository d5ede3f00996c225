"""The callback that says how detectable an attack is."""

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
from lightning_wdefense.callbacks.evaluation.attacked_batch import AttackedBatch
from lightning_wdefense.callbacks.evaluation.base import EvaluationMonitor, Noise
from lightning_wdefense.callbacks.target import Through
from lightning_wdefense.detection import DETECTORS, CriticScore, Detector, FeatureSqueezing, get_detector
from lightning_wdefense.metrics import AUROC, Detectability
from lightning_wdefense.modules.batches import Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, logits_of
from lightning_wdefense.modules.recording import PENULTIMATE

Detectors = Sequence[str | Detector] | Mapping[str, str | Detector]
"""Several detectors: names, detectors, or a mapping from names of your own to either."""

PART = 1024
"""Samples that are scored at once."""


class Samples:
    """What a model showed of some samples, in parts."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {"outputs": [], "features": [], "labels": []}

    def add(self, outputs: Tensor, features: Tensor, labels: Tensor) -> None:
        """Add logits ``(N, K)``, features ``(N, D)`` and classes ``(N,)`` of ``N`` samples."""
        # A model that diverged has no features to measure; that is no reason to end its run.
        finite = outputs.isfinite().all(1) & features.isfinite().all(1)
        if finite.any():
            for part, values in (("outputs", outputs), ("features", features), ("labels", labels.unsqueeze(1))):
                self.parts[part].append(values[finite].detach())

    def read(self, part: str) -> Tensor | None:
        """All of one part, ``(N, D)``; ``None`` if there is nothing."""
        return torch.cat(self.parts[part]) if self.parts[part] else None


class DetectionMeasures:
    """What is kept of one dataloader: clean samples to learn from, and clean and attacked ones to judge by.

    Of detectors that read inputs the scores are kept, in ``metrics``, and not the inputs.
    """

    def __init__(self, detectors: Iterable[str], device: torch.device) -> None:
        self.samples = 0
        self.learn, self.clean, self.attacked = Samples(), Samples(), Samples()
        self.metrics = {name: Detectability().to(device) for name in detectors}


class DetectionMonitor(EvaluationMonitor[DetectionMeasures]):
    """Attacks validation and test batches of any LightningModule and logs how well detectors tell the attacked samples.

    Logged at the end of each epoch, with ``{stage}`` ``val`` or ``test``: ``{stage}/auroc_{detector}``, the area under the ROC curve
    between clean samples that are classified correctly and those of them that the attack broke; 0.5 is chance. It is NaN if
    the attack broke none. Every second sample is only learned from (its clean features), the others are attacked
    and judged, so that no detector is judged on what it has learned; batches should be shuffled. The attack does not know the detectors:
    a high value here is no proof against one that does.

    Several dataloaders are told apart as Lightning does, by ``/dataloader_idx_{i}``. Under several ranks detectors learn from all of
    them. The features of all samples are kept until the end of the epoch, see ``max_batches``.

    Args:
        threat: what the attacker may do.
        attack: a name or an attack; it must stay in the ball.
        detectors: names, detectors, or a mapping from names of your own to them. Besides the default ones there are ``"mahalanobis"``
            (needs scikit-learn, ``pip install "lightning-wdefense[detection]"``) and, for inputs within bounds,
            ``"feature-squeezing"``. One of your own that reads inputs must be fitted already, for inputs are not kept.
        features: what detectors that read features are given: ``"penultimate"`` (the input of the last linear layer that runs),
            ``"outputs"``, or a dotted path to a submodule of the model.
        every_n_epochs: measure only every so many training epochs (the first validation always); in between the last values are
            logged again.
        max_batches: measure only the first batches of each dataloader.
        model: dotted path to the submodule that takes the inputs and returns logits, if not the module itself.
        through: as for :class:`RobustnessMonitor`; so are the next ones.
        perturb: the submodule whose output is attacked in place of the inputs.
        inputs: where the inputs are in a batch.
        labels: the same for the labels.
        outputs: where in what the model returns the logits are.
        dataloaders: indices of the dataloaders whose batches are attacked.
        seed: seeds the attack's noise, the same in every epoch.
        progress: show a progress bar where the attack takes more than a few seconds.
        name: tells several monitors apart, in the logs (``{stage}/{name}/...``) and in checkpoints.

    Attributes:
        aurocs: the last values with their bootstrap intervals, by the keys they were logged under.

    Raises:
        ValueError: for an unknown detector or attack, two detectors of a name, one that would have to learn from inputs, or an attack that
            leaves the ball.
        TypeError: for what is neither a name nor a detector.

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

    @property
    def _threat(self) -> ThreatModel:
        return self.threat

    def check(self, attacked_batch: AttackedBatch) -> None:
        """Refuse a batch whose labels are not classes of the outputs.

        Raises:
            ValueError: saying so.
        """
        if not attacked_batch.classifies:
            raise ValueError(
                "DetectionMonitor judges classifiers, and the labels of the batch are not seen to be classes of the model's outputs: say where the "
                'logits are with outputs= or model=, and through="model" for a plain pass of it.'
            )

    def measure(self, measures: DetectionMeasures, attacked_batch: AttackedBatch, noise: Noise) -> None:
        """Attack every second sample, and keep what the detectors read of the batch."""
        inputs, labels, model = attacked_batch.inputs, attacked_batch.labels, attacked_batch.model
        judged = (torch.arange(len(inputs), device=inputs.device) + measures.samples) % 2 == 1
        measures.samples += len(inputs)
        attacks = {name: attacked_batch.fitted(attack) for name, attack in self.attack.items()}
        result = worst_case(model, attacks, inputs, labels, samples=judged, generator=noise, on_attack=self.show)
        if result.labels.ndim > 1:
            raise ValueError(
                f"DetectionMonitor judges samples of one class each, but there are labels of shape {tuple(result.labels.shape)}."
            )
        (predicted,) = result.adversarial.values()
        right, broken = result.attacked, result.attacked & (predicted != result.labels)
        clean = inputs.detach().clone()
        # Whole batches, since not every model takes a part of one.
        before, after = self.observe(attacked_batch, clean, result.inputs)
        for samples, (outputs, features), mask in (
            (measures.learn, before, ~judged),
            (measures.clean, before, right),
            (measures.attacked, after, broken),
        ):
            samples.add(logits_of(outputs).detach()[mask], features[mask], result.labels[mask])
        for name, detector in self.detectors.items():
            if detector.reads == "inputs":
                judge = detector.of_model(model)
                parts = (clean[right], result.inputs[broken])
                sides = [judge.score(part) if len(part) else clean.new_empty(0) for part in parts]
                measures.metrics[name].update(*(scores[scores.isfinite()] for scores in sides))

    def compute(self, measures: DetectionMeasures, trainer: Trainer, key: Callable[[str], str]) -> dict[str, float]:
        """Let the detectors learn, and judge them."""
        values: dict[str, float] = {}
        # The metrics' own tensors were not made under inference_mode either.
        with torch.inference_mode(False), torch.no_grad():
            for name, detector in self.detectors.items():
                metric, short = measures.metrics[name], f"auroc_{name}"
                if detector.reads != "inputs":
                    metric.update(*self._judge(name, detector, measures, metric.device))
                self.aurocs[key(short)] = metric.compute()
                values[short] = float(self.aurocs[key(short)].value)
        return values

    def _judge(self, name: str, detector: Detector, measures: DetectionMeasures, device: torch.device) -> list[Tensor]:
        """Scores of the clean and of the attacked samples of this rank; none if the detector could not learn."""
        none = [torch.empty(0, device=device)] * 2
        if detector.learns:
            features, labels = (gather_rows(measures.learn.read(part), device) for part in (detector.reads, "labels"))
            try:
                detector = copy.copy(detector).fit(features, labels.flatten().long())
            except ValueError as error:
                # A collapsed model or a rare class is no reason to end a run.
                rank_zero_warn(f"The detector {name!r} could not be fitted, so its AUROC is NaN. {error}")
                return none
        sides = [measures.clean.read(detector.reads), measures.attacked.read(detector.reads)]
        return [
            empty if side is None else torch.cat([detector.score(part) for part in side.split(PART)])
            for side, empty in zip(sides, none, strict=True)
        ]


def gather_rows(rows: Tensor | None, device: torch.device) -> Tensor:
    """Rows ``(N, D)`` of all ranks, of which some may have none; without any, ``(0, 1)``."""
    if jit_distributed_available():
        width = torch.tensor(0 if rows is None else rows.shape[1], device=device)
        width = torch.stack(gather_all_tensors(width)).max()
        # Flat, because a rank without rows takes part with an empty vector.
        flat = torch.empty(0, device=device) if rows is None else rows.float().flatten()
        return torch.cat(gather_all_tensors(flat)).reshape(-1, max(int(width), 1))
    return torch.empty(0, 1, device=device) if rows is None else rows


def named_detectors(detectors: Detectors, threat: ThreatModel) -> dict[str, Detector]:
    """Detectors by name, each name once.

    Raises:
        TypeError: for what is neither a name nor a detector.
        ValueError: for an unknown name, two of a name, none at all, or a detector that would have to learn from inputs.
    """

    def make(name: str) -> Detector:
        if DETECTORS.get(name) is CriticScore:
            raise ValueError("The detector 'critic' needs a critic: give CriticScore(critic) in place of its name.")
        return get_detector(name, **({"threat": threat} if DETECTORS.get(name) is FeatureSqueezing else {}))

    found = resolved("detectors", Detector, detectors, make, example="energy")  # type: ignore[type-abstract]
    for name, detector in found.items():
        if detector.reads == "inputs" and not detector.ready:
            raise ValueError(
                f"The detector {name!r} learns from inputs, which DetectionMonitor does not keep: fit it first."
            )
    return found

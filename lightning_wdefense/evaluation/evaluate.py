"""Measure the robustness of a model without a Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.metric import jit_distributed_available

from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks.minimal.base import MinimalAttack
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.attacks.steps.inspection import needs_whole_batches
from lightning_wdefense.attacks.steps.sites import InputSite
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.evaluation.attacked_batch import ModelBatch
from lightning_wdefense.evaluation.measures import Details, Measures
from lightning_wdefense.evaluation.progress import TqdmProgress, status
from lightning_wdefense.evaluation.protocol import EvaluationProtocol, check_examples, check_max_batches
from lightning_wdefense.evaluation.result import EvaluationResult
from lightning_wdefense.evaluation.resuming import KeptWork, asked_for, data_digest
from lightning_wdefense.evaluation.samples import Samples, joined, samples_of
from lightning_wdefense.evaluation.subject import Subject
from lightning_wdefense.metrics import AccuracyCurve
from lightning_wdefense.modules.batches import BatchReader, Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, output_picker
from lightning_wdefense.modules.parallel import is_sharded
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.recording import PENULTIMATE
from lightning_wdefense.modules.state.random_state import RandomState


def evaluate(
    model: Any,
    loader: Iterable[Any],
    threat: ThreatModel,
    attacks: Attacks = ("pgd",),
    *,
    epsilons: Sequence[float] | None = None,
    distances: str | MinimalAttack | None = None,
    p: float = 2.0,
    max_batches: int | None = None,
    independent: bool = False,
    ignore_index: int | None = None,
    features: str | None = PENULTIMATE,
    examples: int = 0,
    inputs: Inputs = None,
    labels: Labels = None,
    outputs: Pick = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
) -> EvaluationResult:
    """Attack the batches of a loader and measure how robust a classifier is, without a Trainer.

    It measures what :class:`~lightning_wdefense.RobustnessMonitor` measures by plain forward passes, by the same code: on the same
    model, data and seed the values are the same. The model runs in eval mode. It is left as it was, also after an exception: modes,
    gradients, buffers, ``requires_grad`` and random states.

    With an initialised ``torch.distributed`` process group every rank must call it, each with its own share of the data. The values
    and samples are those of all ranks, the same on every rank, and each rank draws other noise. Ranks may have different numbers of
    batches, or none. Samples that a sampler repeats, so that all ranks have equally many, count twice.

    Args:
        model: an ``nn.Module`` from inputs to logits. It may be compiled, wrapped by ``DistributedDataParallel``, or set up by Fabric
            (then it runs in Fabric's precision). For mixed precision elsewhere call ``evaluate`` inside of ``torch.autocast``.
        loader: any iterable of batches: tuples, lists, mappings or objects, also nested. Batches are moved to the model's device.
        threat: the threat model: norm, perturbation budget eps (data units) and bounds.
        attacks: names, attacks, or a mapping from your own names to attacks. They run in this order, each only on the samples that
            are still classified correctly. A claim of robustness needs at least ``"autoattack"``.
        epsilons: values of eps (data units) for the accuracy curve. Each value costs one run of all attacks on the samples that are
            still classified correctly, unless ``distances`` is given.
        distances: a minimum-norm attack, such as ``"fmn"``, or ``FMN(threat, targets=4)`` for claims. One run of it gives the distance
            of each sample to the decision boundary, and with it the whole accuracy curve (at ``epsilons``, or at 21 values up to eps),
            the median distance and the distributional accuracy. What the attacks found counts as well.
        p: order of the Wasserstein distance of the distributional accuracy, from 1 to infinity.
        max_batches: attack only the first ``max_batches`` batches (of each rank).
        independent: run each attack on every sample that is classified correctly on clean inputs. Then ``robust_acc_{attack}`` does
            not depend on the other attacks.
        ignore_index: label of pixels that are left out, such as 255. Pixels with label -100 are always left out.
        features: where the transport shift is measured: ``"penultimate"``, ``"outputs"``, a dotted path to a submodule, or ``None``
            for no transport shift.
        examples: number of the least and of the most robust samples whose inputs the result keeps, for a report. With them the
            transport plan between clean and adversarial ``features`` by class is measured. For one label a sample, not for masks.
        inputs: where the inputs are in a batch: a position, key or attribute, a path (``"image.pixels"``, ``(0, 1)``), or a callable
            that gets and sets the inputs. By default they are found by convention.
        labels: the same for the labels.
        outputs: key, position or callable that finds the logits in the model's return value. ``"logits"`` and ``"out"`` are found
            without it.
        device: where the batches are moved to, if it is not the device of the model's first parameter.
        seed: seed of the attacks' noise.
        progress: show a progress bar, with the time left, if the attacks take more than a few seconds.
        resume: a file in which the finished batches are kept. Called again with the same arguments after an interruption, of whatever
            kind, the finished batches are read from the loader but not attacked again, and the result is that of an uninterrupted run
            to the bit. Called again after the end, nothing is attacked. A loader that shuffles needs the same seed each time. Your
            own code is not compared: delete the file if you have changed it. Each of several ranks has a file of its own.

    Returns:
        The values with intervals, what happened to each sample, and the accuracy curve.

    Raises:
        TypeError: if the model is not an ``nn.Module`` or is sharded, ``threat`` is not a threat model, or the inputs are not floating
            point.
        ValueError: if an attack is unknown, is unbounded, or was made for another threat model; if the loader gives no batch, inputs
            or labels are not found, the inputs do not fit the threat model, the outputs are probabilities, or the labels are no
            classes of the outputs. For other tasks, such as regression, use ``RobustnessMonitor``, which can attack the loss of a
            LightningModule's own step. Also if the file of ``resume`` is of another model, other settings or other data, or is no such
            file; the message says what differs, and the file stays as it is.
        RuntimeError: if the evaluation failed on another rank.

    Example:
        >>> import torch
        >>> from lightning_wdefense import ThreatModel, evaluate
        >>> loader = [(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 1]))]
        >>> result = evaluate(torch.nn.Identity(), loader, ThreatModel(eps=0.2), epsilons=[0.05, 0.2], features=None)
        >>> result.clean_acc, result.robust_acc
        (1.0, 0.5)
        >>> result.curve.accuracies
        tensor([1.0000, 1.0000, 0.5000])
    """
    check_max_batches(max_batches)
    subject = Subject.of(model)
    protocol = EvaluationProtocol.of(
        threat,
        attacks,
        epsilons=epsilons,
        independent=independent,
        ignore_index=ignore_index,
        features=subject.layer(features),
        distances=distances,
        p=p,
        examples=check_examples(examples),
    )
    place = subject.device if device is None else torch.device(device)
    evaluation = _Evaluation(subject, protocol, BatchReader(inputs, labels), outputs, place, seed)
    failure: Exception | None = None
    try:
        if resume is not None:
            evaluation.keep_in(Path(resume), max_batches=max_batches)
        evaluation.run(loader, max_batches, progress)
    except Exception as error:
        failure = error
    samples = evaluation.gathered(failure)
    values, curve, details = evaluation.compute()
    return EvaluationResult(values, samples, threat, tuple(protocol.attacks), curve, *details)


class _Evaluation:
    """One evaluation on this rank."""

    def __init__(
        self,
        subject: Subject,
        protocol: EvaluationProtocol,
        reader: BatchReader,
        outputs: Pick,
        device: torch.device | None,
        seed: int,
    ) -> None:
        self._subject, self._protocol, self._reader, self._outputs = subject, protocol, reader, outputs
        self._device, self._seed = device, seed
        self._several = jit_distributed_available()
        self._rank = torch.distributed.get_rank() if self._several else 0
        self._kept: KeptWork | None = None
        self._whole: bool | None = None
        self._measures: Measures | None = None
        self._samples: Samples = {}

    @torch.inference_mode(False)
    def keep_in(self, path: Path, **settings: Any) -> None:
        """Keep the finished batches in a file, and take those that it holds.

        Args:
            path: the file; with several ranks each adds its own suffix.
            settings: settings that decide the values, beside those that this evaluation knows.

        Raises:
            ValueError: if the file is of another evaluation, or the model is sharded.
        """
        module, protocol = self._subject.module, self._protocol
        if is_sharded(module):
            raise ValueError(
                "resume= needs a model that each rank runs by itself. All ranks run a sharded model together, and may have finished "
                "different numbers of batches: evaluate without resume=, or on one device, with the weights gathered."
            )
        size = torch.distributed.get_world_size() if self._several else 1
        settings |= {field.name: getattr(protocol, field.name) for field in fields(protocol)}
        settings |= {"outputs": self._outputs, "seed": self._seed, "rank": (self._rank, size)}
        # Devices of one kind compute the same values.
        settings |= {"precision": self._subject.precision, "device": self._device and self._device.type}
        own = path if size == 1 else path.with_name(f"{path.name}.rank{self._rank}")
        self._kept = KeptWork(own, asked_for(module, **settings))

    def run(self, loader: Iterable[Any], max_batches: int | None, progress: bool) -> None:
        """Attack the batches of this rank."""
        # A loader draws numbers even if it does not shuffle. The model's own are restored by what runs it.
        random_state = RandomState(torch.device("cpu") if self._device is None else self._device)
        total = _batches(loader, max_batches) * self._protocol.attacks_a_batch
        bar = TqdmProgress(total, progress and self._rank == 0)
        taken = 0
        try:
            start = time.perf_counter()
            for index, batch in enumerate(islice(loader, max_batches)):
                # Tensors made under inference_mode, even a metric's state, cannot be used with gradients later.
                with torch.inference_mode(False), torch.no_grad(), self._subject.context():
                    start = self._take(index, batch, bar, start)
                taken += 1
            if self._kept is not None:
                self._kept.finish(taken)
        finally:
            bar.close()
            random_state.restore()

    def gathered(self, failure: Exception | None) -> Samples:
        """The samples of all ranks.

        Raises:
            Exception: the failure of this rank, if there is one.
            RuntimeError: if another rank failed.
            ValueError: if there is no sample.
        """
        met: list[Any] = [self._samples]
        if self._several:
            # A rank that failed takes part too, so that the others do not wait for it.
            mine = self._samples if failure is None else f"{type(failure).__name__}: {failure}"
            met = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(met, mine)
        if failure is not None:
            raise failure
        for rank, found in enumerate(met):
            if isinstance(found, str):
                raise RuntimeError(f"The evaluation failed on rank {rank}, so there are no values. {found}")
            if self._several and found:
                found["rank"] = torch.full_like(found["broken_by"], rank)
        parts = [found for found in met if found]
        if not parts:
            raise ValueError(
                "The loader gave no batch, so there is nothing to measure. An iterator or a generator can be used only once: pass a "
                "loader or a list of batches."
            )
        return joined(parts)

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute(self) -> tuple[dict[str, float], AccuracyCurve | None, Details]:
        """The values of all ranks, the accuracy curve, and what a report shows beside them."""
        start = time.perf_counter()
        # Every rank takes part in the reduction, even a rank without data.
        measures = self._measures or self._protocol.new_measures(self._device or torch.device("cpu"))
        values, curve = self._protocol.compute(measures)
        curve = None if curve is None else AccuracyCurve(*(each.cpu() for each in curve))
        return values, curve, measures.details(start)

    def _take(self, index: int, batch: Any, bar: TqdmProgress, start: float) -> float:
        """Attack a batch, unless it is finished already.

        Args:
            index: place of the batch.
            batch: the batch.
            bar: the progress bar.
            start: when the time of the batch began.

        Returns:
            When it ended.
        """
        kept = self._kept
        if kept is not None:
            read = self._reader.read(batch)
            digest = data_digest(*read)
            if kept.has(index, digest):
                if self._measures is None:
                    self._measures = self._protocol.new_measures(self._device or read[0].device)
                    kept.restore(self._measures)
                    self._samples, self._whole = kept.samples, kept.whole
                bar.skip(self._protocol.attacks_a_batch)
                return time.perf_counter()
        samples = self._attack(index, batch, bar)
        self._samples = joined([table for table in (self._samples, samples) if table])
        assert self._measures is not None
        end = time.perf_counter()
        self._measures.seconds.update(total=end - start)
        if kept is not None:
            kept.add(digest, self._samples, self._measures, bool(self._whole))
        return end

    def _attack(self, index: int, batch: Any, bar: TqdmProgress) -> Samples:
        batch = self._subject.inputs(map_tensors(batch, self._usable))
        protocol, module = self._protocol, self._subject.module
        inputs, labels = self._reader.read(batch)
        if self._whole is None:
            protocol.threat.read(inputs)  # its errors say more than those of a model that gets the wrong inputs
            pick = output_picker(self._outputs)
            self._whole = needs_whole_batches(module, inputs, pick or (lambda found: found))
            self._measures = protocol.new_measures(inputs.device)
        assert self._measures is not None
        site = InputSite(self._reader, batch, protocol.threat)
        attacked = ModelBatch(module, site, labels, self._outputs, accepts_partial_batches=not self._whole)

        def noise() -> torch.Generator:
            # The place of the batch in the first dataloader, as in the monitors.
            return seeded_generator(inputs.device, self._seed, 0, index, self._rank)

        def show(attack: str, left: Tensor) -> None:
            bar.advance(status(attack, left))

        return samples_of(*protocol.measure(self._measures, attacked, noise, show))

    def _usable(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self._device is None else tensor.to(self._device)
        return tensor.clone() if tensor.is_inference() else tensor


def _batches(loader: Iterable[Any], most: int | None) -> float:
    """Number of batches that are attacked; infinite if it is not known."""
    try:
        known = float(len(loader))  # type: ignore[arg-type]
    except TypeError:  # no length, or a DataLoader of an iterable data set
        known = float("inf")
    return known if most is None else min(known, most)

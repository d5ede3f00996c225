"""Audit a robustness claim: `audit(model, loader, threat)`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense.attacks.labels import class_labels, hard_labels
from lightning_wdefense.attacks.registry import Attacks
from lightning_wdefense.attacks.steps.inspection import needs_whole_batches
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.audit.case import Case, claimed_attacks
from lightning_wdefense.audit.checks import CHECKS
from lightning_wdefense.audit.findings import AuditReport, Finding
from lightning_wdefense.audit.views.base import Logits, activation_of
from lightning_wdefense.audit.views.noise import Averaged
from lightning_wdefense.evaluation.progress import TqdmProgress
from lightning_wdefense.evaluation.subject import Subject
from lightning_wdefense.modules.batches import BatchReader, Inputs, Labels
from lightning_wdefense.modules.outputs import Pick, PickedOutputModel, output_picker, tensor_of
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.state.isolation import isolated
from lightning_wdefense.modules.state.random_state import RandomState

DRAWS = 4
"""Draws of a random model's noise in each pass of an attack."""


CALLS = 16
"""Calls after the first that are compared with it: a model that picks one of two networks escapes once in 65,536 times."""


def audit(
    model: Any,
    loader: Iterable[Any],
    threat: ThreatModel,
    attacks: Attacks | None = None,
    *,
    samples: int = 200,
    twin: Any = None,
    inputs: Inputs = None,
    labels: Labels = None,
    outputs: Pick = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """Check whether the robust accuracy that attacks leave is to be believed.

    Most defences that were published and later broken had been measured wrongly. Each check here is a way in which that happened:
    gradients that are zero or point nowhere, noise, rounding, probabilities in the place of logits, attacks with too few steps. Each
    gives a figure, a verdict, and what to do. The model is left as it was, also after an exception.

    Args:
        model: an ``nn.Module`` from inputs to logits, as for :func:`~lightning_wdefense.evaluate`.
        loader: any iterable of batches.
        threat: the threat model.
        attacks: the attacks that the claim rests on: names, attacks, or a mapping from your own names to attacks. ``None`` for the
            strongest by gradients: APGD and targeted APGD in L-infinity and L2, PGD in L1, ``WassersteinAttack`` in its norm. Pass
            the attacks that you measured with: the audit says whether they were strong enough.
        samples: number of samples, the first ones of the loader. Of 200 samples each is half a point.
        twin: an undefended model of the same task, such as the same architecture trained as usual, to transfer attacks from.
        inputs: where the inputs are in a batch, as in :func:`~lightning_wdefense.evaluate`.
        labels: the same for the labels.
        outputs: key, position or callable that finds the logits in the model's return value.
        device: where the batches are moved to, if it is not the device of the model's first parameter.
        seed: seed of all noise.
        progress: show a progress bar if the audit takes more than a few seconds.

    Returns:
        The findings, with the accuracy as claimed and as left by all that the audit tried.

    Raises:
        TypeError: if the model is not an ``nn.Module``, or the inputs are not floating point.
        ValueError: if an attack is unknown, unbounded or made for another threat model, eps is 0, the loader gives no sample, the
            inputs do not fit the threat model, or the labels are not one class for each sample.

    References:
        Carlini et al., "On evaluating adversarial robustness", 2019. Athalye, Carlini, Wagner, "Obfuscated gradients give a false
        sense of security", 2018. Tramer et al., "On adaptive attacks to adversarial example defenses", 2020. Zimmermann et al.,
        "Increasing confidence in adversarial robustness evaluations", 2022.

    Example:
        >>> import torch
        >>> from lightning_wdefense import ThreatModel
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Softmax(1))
        >>> batch = torch.rand(40, 8), torch.randint(3, (40,))
        >>> report = audit(model, [batch], ThreatModel(eps=0.1), progress=False)
        >>> "logits" in report.failed
        True
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    begin = time.perf_counter()
    claim = claimed_attacks(attacks, threat)
    subject = Subject.of(model)
    place = subject.device if device is None else torch.device(device)
    before = RandomState(torch.device("cpu") if place is None else place)
    with torch.inference_mode(False), torch.no_grad(), subject.context():
        try:
            data, classes, size = _samples(subject, loader, BatchReader(inputs, labels), samples, place)
        finally:
            before.restore()  # a loader draws numbers even if it does not shuffle
        case = _case(subject, data, classes, threat, claim, twin, outputs, size, seed)
        bar = TqdmProgress(len(CHECKS) + 1, progress)
        try:
            _claim(case)
            bar.advance("claim")
            findings: list[Finding] = []
            for name, check in CHECKS.items():
                findings.append(check(case))
                bar.advance(name)
        finally:
            bar.close()
    return AuditReport(
        tuple(findings),
        threat,
        tuple(claim),
        len(case),
        case.accuracy(case.right),
        case.accuracy(case.claimed),
        case.accuracy(case.claimed & ~case.lost),
        time.perf_counter() - begin,
    )


def _samples(
    subject: Subject, loader: Iterable[Any], reader: BatchReader, count: int, device: torch.device | None
) -> tuple[Tensor, Any, int]:
    """Inputs and labels of the first samples of a loader, and the size of its batches."""
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        batch = map_tensors(batch, lambda tensor: (tensor if device is None else tensor.to(device)).clone())
        inputs, labels = reader.read(subject.inputs(batch))
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"An audit needs labels as a tensor of one class for each sample, got a {type(labels).__name__}."
            )
        parts.append((inputs, labels))
        if sum(len(inputs) for inputs, _ in parts) >= count:
            break
    if not parts:
        raise ValueError("The loader gave no batch, so there is nothing to audit. Pass a loader or a list of batches.")
    size = len(parts[0][0])
    return torch.cat([each for each, _ in parts])[:count], torch.cat([each for _, each in parts])[:count], size


def _case(
    subject: Subject,
    data: Tensor,
    given: Tensor,
    threat: ThreatModel,
    attacks: Any,
    twin: Any,
    outputs: Pick,
    size: int,
    seed: int,
) -> Case:
    """The case: how the model answers, before anything attacks it."""
    module, pick = subject.module, output_picker(outputs)
    threat.read(data)  # its errors say more than those of a model that gets the wrong inputs
    first = data[:size]
    with isolated(module, data.device):
        found = PickedOutputModel(module, pick)(first.clone().requires_grad_().clone())
        activation = activation_of(found)
        shape = tensor_of(found)[:1].expand(len(given), *tensor_of(found).shape[1:])
        labels = hard_labels(class_labels(given, shape, check_values=True))
        if labels.ndim != 1:
            raise ValueError(
                f"An audit needs one class for each sample, got labels of shape {tuple(labels.shape)}: for masks measure with evaluate."
            )
        base = Logits(PickedOutputModel(module, pick), activation)
        once = base(first)
        spread = 1e-3 * float(once.std())
        random = bool(once.isfinite().all()) and any(
            float((base(first) - once).abs().max()) > spread for _ in range(CALLS)
        )
    if not random and needs_whole_batches(module, first, pick or (lambda found: found)):
        base = Logits(PickedOutputModel(module, pick, accepts_partial_batches=False), activation)
    other = None if twin is None else Logits(PickedOutputModel(Subject.of(twin).module, pick))
    view = Averaged(base, DRAWS) if random else base
    return Case(module, base, view, data, labels, threat, attacks, other, random, size, seed)


def _claim(case: Case) -> None:
    """Run the claim's own attacks, as the user did: on one draw of the noise, if there is noise."""
    case.right = case.classes(case.inputs) == case.labels
    case.lost = torch.zeros_like(case.right)
    left = case.right
    for attack in case.attacks.values():
        if bool(left.any()):
            moved = case.adversarial(attack, case.base, left)
            left = left & (case.classes(moved, case.base) == case.labels)
    case.claimed = left

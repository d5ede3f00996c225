"""The per-sample worst case of a classifier over several attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored, replace_ignore_index
from lightning_wdefense.attacks.partial_batches import PartialBatchModel
from lightning_wdefense.attacks.problem import Model
from lightning_wdefense.modules.outputs import check_logits, predictions, warn_of_no_prediction
from lightning_wdefense.modules.parallel import lockstep
from lightning_wdefense.modules.state.isolation import isolated


class WorstCase(NamedTuple):
    """The result of :func:`worst_case`. All classes are ``(N,)``, or ``(N, ...)`` with one label per element.

    Attributes:
        labels: ground truth labels; -100 for ignored elements.
        clean: predicted classes on the clean inputs; -1 if the outputs are NaN or infinite.
        adversarial: predicted classes after each attack, by its name, in order. Without ``independent=True``, a sample
            that an earlier attack fooled keeps its wrong prediction.
        inputs: adversarial inputs ``(N, ...)`` in model units. For each sample it is the first input that fooled the
            model, otherwise the result of the last attack on it, otherwise (never attacked) the clean input.
        attacked: which samples could be attacked, ``(N,)``.
    """

    labels: Tensor
    clean: Tensor
    adversarial: dict[str, Tensor]
    inputs: Tensor
    attacked: Tensor

    @property
    def robust(self) -> Tensor:
        """Which samples (or elements) are classified correctly on the clean input and after every attack; never ignored elements."""
        left = self.clean == self.labels
        for predicted in self.adversarial.values():
            left = left & (predicted == self.labels)
        return left

    @property
    def worst(self) -> Tensor:
        """The first wrong prediction of each sample; the clean prediction if there is none."""
        worst = self.clean
        for predicted in self.adversarial.values():
            worst = torch.where(worst == self.labels, predicted, worst)
        return worst


def worst_case(
    model: Model,
    attacks: Mapping[str, Attack],
    inputs: Tensor,
    labels: Any,
    *,
    independent: bool = False,
    everyone: bool = False,
    samples: Tensor | None = None,
    ignore_index: int | None = None,
    generator: Callable[[], torch.Generator] | None = None,
    on_attack: Callable[[str, Tensor], None] | None = None,
) -> WorstCase:
    """Run attacks in the given order, each only on the samples that are still classified correctly.

    Args:
        model: an ``nn.Module`` or a callable; it is not changed.
        attacks: the attacks, by name.
        inputs: ``(N, ...)`` in model units.
        labels: ground truth labels: class indices ``(N,)``, soft labels ``(N, K)``, or one label per element
            (segmentation). In the last case every attack runs on all samples.
        independent: run each attack on all samples that the model classifies correctly on the clean input.
        everyone: let the first attack also perturb the samples that were misclassified before, for measures other than
            accuracy.
        samples: which samples may be attacked, a boolean mask ``(N,)``; ``None`` for all.
        ignore_index: label of elements (pixels) to ignore, besides -100. The attacks get -100 in its place.
        generator: makes a random generator for each attack; ``None`` for each attack's own seed.
        on_attack: called after each attack with its name and the mask ``(N,)`` of the samples that remain.

    Returns:
        The predictions before and after the attacks, and the adversarial inputs.

    Raises:
        TypeError: if the inputs are not floating point, or the outputs are not logits.
        ValueError: if the inputs do not fit the threat model, or the labels do not fit the outputs; also what an attack
            raises.

    Example:
        >>> import torch
        >>> from lightning_wdefense.attacks import FGSM, PGD, ThreatModel
        >>> threat = ThreatModel(norm="l2", eps=0.5, bounds=None)
        >>> inputs, labels = torch.tensor([[2.0, 0.0], [0.2, 0.0]]), torch.tensor([0, 0])
        >>> found = worst_case(torch.nn.Identity(), {"fgsm": FGSM(threat), "pgd": PGD(threat)}, inputs, labels)
        >>> found.robust
        tensor([ True, False])
    """
    with isolated(model, inputs.device):
        inputs = inputs.detach().clone()
        _check_inputs(inputs, attacks)
        labels = replace_ignore_index(labels, ignore_index)
        outputs = model(
            inputs.clone().requires_grad_().clone()
        )  # with an autograd graph, which check_logits reads; on a copy, because the model may work in place
        check_logits(outputs)
        target = hard_labels(class_labels(labels, outputs, check_values=True))
        warn_of_no_prediction(clean := predictions(outputs))
        del outputs  # frees the graph of the whole batch, which the attacks do not need
        whole = clean.ndim > 1
        open_ = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device) if whole else clean == target
        if samples is not None:
            open_ = open_ & samples
        ranks = lockstep(model)
        by_parts = ranks.size == 1 and getattr(model, "accepts_partial_batches", True)
        run = PartialBatchModel(model, inputs, whole=not by_parts)
        worst, latest, attacked = inputs.clone(), clean, open_.clone()
        broken = torch.zeros_like(open_)
        adversarial: dict[str, Tensor] = {}
        for name, attack in attacks.items():
            chosen = (open_ if independent or whole else open_ & ~broken).nonzero().squeeze(1)
            if everyone and not adversarial:
                chosen = torch.arange(len(inputs), device=inputs.device)
            predicted = (clean if independent or whole else latest).clone()
            if ranks.any(len(chosen) > 0, inputs.device):
                noise = generator() if generator is not None else None
                found = attack(model, inputs, labels, generator=noise, samples=chosen)[chosen]
                warn_of_no_prediction(after := predictions(run(found.clone())))
                predicted[chosen] = after
                fresh = ~broken[chosen]
                worst[chosen[fresh]] = found[fresh]
            wrong = (predicted != target) & not_ignored(target)
            broken = broken | (wrong.flatten(1).any(1) if whole else wrong & open_)
            adversarial[name], latest = predicted, predicted
            if on_attack is not None:
                on_attack(name, open_ & ~broken)
    return WorstCase(target, clean, adversarial, worst, attacked)


def _check_inputs(inputs: Tensor, attacks: Mapping[str, Attack]) -> None:
    # Each attack checks only the samples that it gets, which may be none. Here all inputs are checked, before the model runs.
    for threat in {attack.threat for attack in attacks.values()}:
        threat.read(inputs)

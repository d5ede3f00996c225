"""What is left of a model's accuracy after several attacks, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.base import Attack, Model
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored, replace_ignore_index
from lightning_wdefense.attacks.partial_batches import PartialBatchModel
from lightning_wdefense.modules.outputs import check_logits, predictions, warn_of_no_prediction
from lightning_wdefense.modules.state.isolation import isolated


class WorstCase(NamedTuple):
    """The outcome of :func:`worst_case`.

    Attributes:
        labels: true classes; -100 where they are ignored.
        clean: predicted classes on the clean inputs; -1 where the outputs are NaN or infinite.
        adversarial: predicted classes after each attack, by its name, in order. In order mode a sample that an
            earlier attack broke keeps its wrong prediction.
        inputs: for each sample the input that broke it, else the last one tried, else (never attacked) the clean one.
        attacked: which samples were attacked.
    """

    labels: Tensor
    clean: Tensor
    adversarial: dict[str, Tensor]
    inputs: Tensor
    attacked: Tensor

    @property
    def robust(self) -> Tensor:
        """Which samples (or elements, of which those that are ignored are never) are right on the clean input and after every attack."""
        left = self.clean == self.labels
        for predicted in self.adversarial.values():
            left = left & (predicted == self.labels)
        return left

    @property
    def worst(self) -> Tensor:
        """Predicted classes where it went wrong, else the clean ones."""
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
    """Run attacks in the order given, each only on the samples that are still classified correctly.

    Args:
        model: an ``nn.Module`` or a callable, left as it was.
        attacks: by name.
        inputs: ``(N, ...)`` in model units.
        labels: class indices or soft labels. With one label an element (segmentation) every attack runs on all samples.
        independent: run each attack on all samples that the model gets right, not only on what is left.
        everyone: have the first attack move also the samples that were wrong before, for measures other than accuracy.
        samples: which samples may be attacked, a boolean mask ``(N,)``; ``None`` for all.
        ignore_index: label of elements (pixels) that count for nothing; beside it, -100 always is. The attacks are given -100 for it.
        generator: makes the source of noise for each attack; ``None`` for each attack's own seed.
        on_attack: called after each attack with its name and the samples that are left, ``(N,)``.

    Raises:
        TypeError: if the inputs are not floating point, or the outputs are not logits.
        ValueError: if inputs or labels do not fit, or an attack finds the outputs unfit.
    """
    with isolated(model, inputs.device):
        inputs = inputs.detach().clone()
        _check_inputs(inputs, attacks)
        labels = replace_ignore_index(labels, ignore_index)
        outputs = model(
            inputs.clone().requires_grad_().clone()
        )  # whose graph says what made them; the model may work in place
        check_logits(outputs)
        target = hard_labels(class_labels(labels, outputs, check_values=True))
        warn_of_no_prediction(clean := predictions(outputs))
        del outputs  # and with them the graph of the whole batch, which the attacks do not need
        whole = clean.ndim > 1
        open_ = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device) if whole else clean == target
        if samples is not None:
            open_ = open_ & samples
        run = PartialBatchModel(model, inputs, whole=not getattr(model, "accepts_partial_batches", True))
        worst, latest, attacked = inputs.clone(), clean, open_.clone()
        broken = torch.zeros_like(open_)
        adversarial: dict[str, Tensor] = {}
        for name, attack in attacks.items():
            chosen = (open_ if independent or whole else open_ & ~broken).nonzero().squeeze(1)
            if everyone and not adversarial:
                chosen = torch.arange(len(inputs), device=inputs.device)
            predicted = (clean if independent or whole else latest).clone()
            if len(chosen):
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
    # The attacks check what they are given, which may be a part or nothing, and only once the model has run.
    for threat in {attack.threat for attack in attacks.values()}:
        threat.read(inputs)

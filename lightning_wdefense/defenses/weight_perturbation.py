"""Adversarial weight perturbation (AWP): the gradient of the loss is taken at perturbed weights that increase the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._ranks import Ranks
from lightning_wdefense.modules.autograd import gradients


class WeightPerturbation:
    """Perturbs a model's weights for one backward pass, and restores them exactly (Wu et al., 2020).

    Each weight matrix or kernel moves along its gradient by ``size`` times its own norm. Biases and the scales of normalisation
    layers do not change. Weights are changed in place, so an optimizer, DDP or compiled code sees the perturbed weights until
    :meth:`undo`.

    Args:
        model: the model whose weights are perturbed.
        size: length of the perturbation in multiples of each weight's norm.

    References:
        Wu, Xia, Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020.
    """

    def __init__(self, model: nn.Module, size: float) -> None:
        self.model, self.size = model, size
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def ascent_steps(self, loss: Tensor, ranks: Ranks) -> list[tuple[nn.Parameter, Tensor]]:
        """The step of each weight along its gradient, which increases ``loss``. Weights without a gradient have no step.

        Args:
            loss: this rank's loss.
            ranks: the ranks whose mean gradient is followed, so that all perturb the weights alike.
        """
        weights = [weight for weight in self.model.parameters() if weight.requires_grad and weight.ndim > 1]
        directions = _averaged(weights, gradients(loss, weights) if weights else (), ranks)
        steps = []
        with torch.no_grad():
            for weight, gradient in zip(weights, directions, strict=True):
                if gradient is None:
                    continue
                length = gradient.norm()
                # A gradient that is zero or overflowed gives no direction. No branch, because it would wait for the device.
                scale = torch.nan_to_num(self.size * weight.norm() / length, nan=0.0, posinf=0.0)
                steps.append((weight, torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) * scale))
        return steps

    def apply(self, steps: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Add the steps to the weights."""
        self.undo()
        with torch.no_grad():
            for weight, step in steps:
                self._kept.append((weight, weight.detach().clone()))
                weight.add_(step)

    def undo_after(self, loss: Tensor) -> bool:
        """Restore the weights when the backward pass of ``loss`` ends; returns whether ``loss`` has a backward pass."""
        if self._kept and loss.requires_grad:
            loss.register_hook(self._at_the_end_of_backward)
        return loss.requires_grad

    def undo(self) -> None:
        """Restore the weights now."""
        with torch.no_grad():
            while self._kept:
                weight, value = self._kept[-1]
                weight.copy_(value)
                self._kept.pop()  # not before: a signal in between may write a checkpoint

    def undo_in(self, state: dict[str, Any]) -> None:
        """Restore the weights in a module's ``state_dict``; in the module they stay perturbed."""
        kept = {(weight.data_ptr(), weight.shape): value for weight, value in self._kept}
        for key, value in state.items() if kept else ():
            if isinstance(value, Tensor):
                state[key] = kept.get((value.data_ptr(), value.shape), value)

    def _at_the_end_of_backward(self, gradient: Tensor) -> None:
        # DDP uses the same mechanism to know that all gradients are computed.
        torch.autograd.Variable._execution_engine.queue_callback(self.undo)  # type: ignore[attr-defined]


def _averaged(
    weights: Sequence[nn.Parameter], directions: Sequence[Tensor | None], ranks: Ranks
) -> Sequence[Tensor | None]:
    """Mean gradients over the ranks. A gradient that this rank does not have counts as zero; one that no rank has is ``None``."""
    if ranks.size == 1 or not weights:
        return directions
    known = ranks.sum(torch.tensor([float(each is not None) for each in directions], device=weights[0].device)) > 0
    chosen = [i for i, somewhere in enumerate(known.tolist()) if somewhere]
    found = [(weights[i], directions[i]) for i in chosen]
    filled = [torch.zeros_like(weight) if direction is None else direction for weight, direction in found]
    means = dict(zip(chosen, ranks.mean_of_all(filled), strict=True))
    return [means.get(i) for i in range(len(weights))]

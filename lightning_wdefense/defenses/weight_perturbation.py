"""Adversarial weight perturbation: the loss is minimised at the worst weights nearby."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_wdefense.modules.autograd import gradients


class WeightPerturbation:
    """Moves a model's weights uphill for one backward pass, and back to the last bit (Wu et al., 2020).

    Each weight matrix or kernel moves along its gradient by ``size`` times its own norm; biases and norms' scales stay. Weights are
    changed in place, so whatever holds them (an optimizer, DDP, compiled code) sees the perturbed ones until :meth:`undo`.

    Args:
        model: whose weights are perturbed.
        size: length of the perturbation in multiples of each weight's norm.

    References:
        Wu, Xia, Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020.
    """

    def __init__(self, model: nn.Module, size: float) -> None:
        self.model, self.size = model, size
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def ascent_steps(self, loss: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """By how much each weight moves towards a larger ``loss``; weights that it does not depend on stay."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad and weight.ndim > 1]
        directions = gradients(loss, weights) if weights else ()
        steps = []
        with torch.no_grad():
            for weight, gradient in zip(weights, directions, strict=True):
                if gradient is None:
                    continue
                length = gradient.norm()
                # A zero gradient, or one that overflowed, gives no direction. No branch: that would wait for the device.
                scale = torch.nan_to_num(self.size * weight.norm() / length, nan=0.0, posinf=0.0)
                steps.append((weight, torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) * scale))
        return steps

    def apply(self, steps: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Move the weights."""
        self.undo()
        with torch.no_grad():
            for weight, step in steps:
                self._kept.append((weight, weight.detach().clone()))
                weight.add_(step)

    def undo_after(self, loss: Tensor) -> bool:
        """Take the weights back as soon as the backward pass of ``loss`` ends; returns whether there can be one."""
        if self._kept and loss.requires_grad:
            loss.register_hook(self._at_the_end_of_backward)
        return loss.requires_grad

    def undo(self) -> None:
        """Take the weights back now."""
        with torch.no_grad():
            while self._kept:
                weight, value = self._kept.pop()
                weight.copy_(value)

    def _at_the_end_of_backward(self, gradient: Tensor) -> None:
        # The same mechanism by which DDP learns that all gradients are there.
        torch.autograd.Variable._execution_engine.queue_callback(self.undo)  # type: ignore[attr-defined]

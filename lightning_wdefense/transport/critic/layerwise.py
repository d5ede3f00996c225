"""An optimiser whose learning rate is the length of a step, layer by layer: what makes the critic easy to train."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.transport.critic.lipschitz import as_matrix, retract, tangent


class LayerwiseMomentum(torch.optim.Optimizer):
    """Momentum, with one step length for each layer: ``lr`` times its averaged gradient over the gradient's usual length.

    The second moment of Adam is kept for a layer as a whole. So a step turns no entry's noise into a full step, has a length of at most
    ``lr`` whatever the loss is multiplied with, and shrinks where gradients only fluctuate. Weights that must be orthonormal move along
    the Stiefel manifold: the step is projected on its tangent space and the result retracted, to the accuracy of rounding.

    Args:
        network: whose parameters are trained; those of one submodule are a layer.
        lr: length of a step; at most 1 if there are orthonormal weights, whose manifold has radius 1.
        orthonormal: the weights of the network to keep orthonormal.
        betas: decay of the first and second moment.

    Raises:
        ValueError: if ``lr`` is out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        orthonormal: Collection[Tensor] = (),
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        check_rate(lr, orthonormal=bool(orthonormal))
        groups = []
        for layer in network.modules():
            own = [each for each in layer.parameters(recurse=False) if each.requires_grad]
            if own:
                groups.append(
                    {"params": own, "orthonormal": [any(each is kept for kept in orthonormal) for each in own]}
                )
        if not groups:
            raise ValueError("The critic has no parameters to train.")
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every layer against its gradient."""
        for group in self.param_groups:
            lr, (first, second) = group["lr"], group["betas"]
            layer = list(zip(group["params"], group["orthonormal"], strict=True))
            averages, squares = [], []
            for weight, kept in layer:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                if kept:
                    gradient = tangent(as_matrix(weight), as_matrix(gradient)).view_as(weight)
                average = torch.lerp(gradient, self.state[weight].get("average", gradient), first)
                self.state[weight]["average"] = average
                averages.append(average)
                squares.append(gradient.square().sum())
            state = self.state[group["params"][0]]
            square = torch.stack(squares).sum()
            state["square"] = torch.lerp(square, state.get("square", square), second)
            length = torch.stack([average.square().sum() for average in averages]).sum()
            # A gradient that jumps must not throw the layer further than lr.
            scale = lr / torch.maximum(state["square"], length).sqrt().clamp_min(torch.finfo(length.dtype).tiny)
            for (weight, kept), average in zip(layer, averages, strict=True):
                weight.sub_(average * scale)
                if kept:
                    as_matrix(weight).copy_(retract(as_matrix(weight), lr))

    @torch.no_grad()
    def agreement(self) -> float:
        """Cosine between the gradients and the momentum of earlier steps, over all layers; 0 before the first step."""
        weights = [each for group in self.param_groups for each in group["params"]]
        if any("average" not in self.state[each] for each in weights):
            return 0.0
        new = torch.cat([each.grad.flatten() for each in weights])
        old = torch.cat([self.state[each]["average"].flatten() for each in weights])
        return float(torch.cosine_similarity(new, old, dim=0))


def check_rate(lr: float, *, orthonormal: bool) -> None:
    """Refuse a learning rate out of range, which depends on whether there are orthonormal layers.

    Raises:
        ValueError: with the range.
    """
    if not 0 < lr <= (1 if orthonormal else float("inf")):
        raise ValueError(f"lr must be positive{', and at most 1 for orthonormal layers' * orthonormal}, got {lr}.")

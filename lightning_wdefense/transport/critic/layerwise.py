"""A momentum optimiser with one step length per layer, for critics with or without orthonormal weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.transport.critic.lipschitz import as_matrix, retract, tangent


class LayerwiseMomentum(torch.optim.Optimizer):
    """Momentum with one step length per layer: ``lr`` times the averaged gradient, divided by the gradient's usual norm.

    As in Adam there is a second moment, but one per layer instead of one per entry. This has three effects. Noise in single entries
    does not become a full step. The norm of a step is at most ``lr``, for any scale of the loss. Steps become short where gradients
    only fluctuate. Orthonormal weights move on the Stiefel manifold: the gradient is projected to the tangent space, and the result
    of the step is retracted, exactly up to rounding.

    Args:
        network: the network whose parameters are trained; the parameters of one submodule are one layer.
        lr: learning rate, the norm of a step of one layer. At most 1 if there are orthonormal weights.
        orthonormal: the weights of the network that stay orthonormal.
        betas: decay rates of the first and the second moment.

    Raises:
        ValueError: if ``lr`` is out of range, or the network has no parameters.
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
            raise ValueError("The critic has no parameters to train: give it a network with trainable weights.")
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step against the gradient, for every layer. ``closure`` is not used."""
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
            # A sudden large gradient must not move the layer by more than lr.
            scale = lr / torch.maximum(state["square"], length).sqrt().clamp_min(torch.finfo(length.dtype).tiny)
            for (weight, kept), average in zip(layer, averages, strict=True):
                weight.sub_(average * scale)
                if kept:
                    as_matrix(weight).copy_(retract(as_matrix(weight), lr))

    @torch.no_grad()
    def agreement(self) -> float:
        """Cosine similarity of the gradients and the momentum of earlier steps, over all layers; 0 before the first step."""
        weights = [each for group in self.param_groups for each in group["params"]]
        if any("average" not in self.state[each] for each in weights):
            return 0.0
        new = torch.cat([each.grad.flatten() for each in weights])
        old = torch.cat([self.state[each]["average"].flatten() for each in weights])
        return float(torch.cosine_similarity(new, old, dim=0))


def check_rate(lr: float, *, orthonormal: bool) -> None:
    """Raise an error for a learning rate out of range. The range depends on whether there are orthonormal layers.

    Raises:
        ValueError: if ``lr`` is not positive, or is above 1 with orthonormal layers.
    """
    if not 0 < lr <= (1 if orthonormal else float("inf")):
        raise ValueError(f"lr must be positive{', and at most 1 for orthonormal layers' * orthonormal}, got {lr}.")

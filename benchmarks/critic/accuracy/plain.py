"""The critic of WGAN-GP as published, in place of ours in recipe ``critic``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_wdefense.defenses.critic import CriticDiscrepancy
from lightning_wdefense.transport import CriticTraining, WassersteinCritic
from lightning_wdefense.transport.critic.network import Average, CriticObjective
from lightning_wdefense.transport.critic.training import CriticUpdate


class PlainNetwork(nn.Module):
    """A ReLU MLP of the width and depth of ours, in which a sample's class shifts the first hidden layer, as in ours."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(inputs, width), nn.Parameter(torch.randn(classes, width))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, 1)

    def forward(self, points: Tensor, classes: Tensor) -> Tensor:
        hidden = F.relu(self.first(points.flatten(1)) + classes @ self.shift)
        for layer in self.hidden:
            hidden = F.relu(layer(hidden))
        return self.last(hidden)


class PlainCritic(WassersteinCritic):
    """With that network, on points as they are, neither centred nor scaled."""

    def __init__(self, shape: Sequence[int], classes: int, penalty: float, depth: int, seed: int) -> None:
        super().__init__(shape, lipschitz="gradient-penalty", penalty=penalty, depth=depth, classes=classes, seed=seed)
        width = self.network.first[-1].out_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PlainNetwork(torch.Size(shape).numel(), classes, width, depth)

    def adapt(self, x: Tensor, y: Tensor, average: Average | None = None) -> None:
        self._check_batch(x, y)

    def bounded_gap(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.gap(x, y, labels)  # as published


class PlainTraining(CriticTraining):
    """Adam with betas (0, 0.9) at a constant rate, and the same number of steps on every batch. For one process."""

    def __init__(self, critic: PlainCritic, lr: float, steps: int) -> None:
        super().__init__(critic, max_steps=steps)
        self.optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.0, 0.9))

    def update(
        self,
        x: Tensor,
        y: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        average: Average | None = None,
    ) -> CriticUpdate:
        self.critic.adapt(x, y)
        said = self._step(x, y, labels, generator)
        for _ in range(self.max_steps - 1):
            self._step(x, y, labels, generator)
        return CriticUpdate(said.gap.detach(), said.penalty.detach(), said.gradient_norm.detach(), self.max_steps)

    def _step(self, x: Tensor, y: Tensor, labels: Tensor | None, generator: torch.Generator | None) -> CriticObjective:
        said = self._backward(x, y, labels, generator, None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return said


@dataclass(frozen=True)
class PlainDiscrepancy(CriticDiscrepancy):
    """The gap of a plain WGAN-GP critic. ``max_steps`` is the number of its steps on every batch."""

    lr: float = 1e-4

    def start(self, features: Tensor, classes: int | None = None) -> CriticTraining:
        critic = PlainCritic(features.shape[1:], classes or 1, self.penalty, self.depth, self.seed)
        return PlainTraining(critic.to(features.device), self.lr, self.max_steps)

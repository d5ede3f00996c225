"""Functions that the tests name in YAML by their import paths. None has a return annotation, as a user's often have none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


def per_sample_loss(outputs: Tensor, labels: Tensor):
    return (outputs - labels).flatten(1).square().sum(1)


def squared_cost(x: Tensor, y: Tensor):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def mean_of_features(features: Tensor):
    return features.mean(1)


def small_critic(shape) -> nn.Module:
    return nn.Linear(shape.numel(), 1)


@dataclass
class Shift:
    """A discrepancy that is an object."""

    scale: float = 1.0

    def __call__(self, clean: Tensor, adversarial: Tensor, labels):
        return self.scale * (clean - adversarial).square().mean()


class FirstOfPair:
    """Inputs that a callable finds and replaces."""

    def __call__(self, batch, inputs=None):
        return batch["pair"][0] if inputs is None else batch | {"pair": (inputs, batch["pair"][1])}

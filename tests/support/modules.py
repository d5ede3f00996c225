"""Modules to attack: a plain classifier for inputs of any shape, and one as nasty as users' modules get."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def classifier(*shape: int, classes: int = 5, scale: float = 3.0, seed: int = 0) -> nn.Module:
    """A smooth random classifier of inputs ``(N, *shape)`` with BatchNorm, in eval mode."""
    features = int(np.prod(shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, classes)
        )
        with torch.no_grad():
            model[1].weight.normal_(std=scale / features**0.5)
            model[1].bias.normal_()
            model[4].weight.normal_()
    return model.eval()


def batch(*shape: int, model: nn.Module | None = None, n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] and labels that the model gives them (so that an attack has something to break)."""
    inputs = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return inputs, (model or classifier(*shape))(inputs).argmax(1)


class Attending(nn.Module):
    """Mixes the samples of a batch, so that it needs whole batches.

    Attributes:
        sizes: numbers of samples that it was run on.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sizes = net, set()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.add(len(x))
        return self.net(x + 0.5 * x.mean(0))


class Nasty(nn.Module):
    """Does in ``forward`` what attacks must undo, and keeps flags that a plain ``train()`` would lose.

    Args:
        features: of a flattened input.
        fail_at: raise at this call of forward, counted from 1.
    """

    def __init__(self, features: int, classes: int = 5, fail_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.frozen = nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16))
            self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.5))
            self.head = nn.Linear(16, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("cache", None)
        self.fail_at, self.forwards, self.train_calls = fail_at, 0, 0
        self.frozen.requires_grad_(False)
        self.head.bias.requires_grad_(False)
        self.train()
        self.body[0].weight.grad = torch.randn_like(self.body[0].weight)
        self.head.weight.grad = torch.randn_like(self.head.weight)

    def train(self, mode: bool = True) -> Nasty:
        self.train_calls += 1
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        self.seen_modes = {name: module.training for name, module in self.named_modules()}
        self.calls += 1
        if self.forwards == self.fail_at:
            raise RuntimeError("nasty failure")
        inputs.mul_(2).sub_(1)
        hidden = self.frozen(inputs.flatten(1))
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(0)
        self.cache = hidden.detach()
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(16), persistent=False)
        noise = torch.rand_like(hidden) + random.random() + np.random.rand()
        return self.head(self.body(hidden * self.late + 1e-3 * noise))


class Snapshot:
    """The state that an attack must leave alone; ``check()`` compares."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.parameters = {
            name: (p, p.detach().clone(), p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters()
        }
        self.buffers = {
            (name, key): (buffer, None if buffer is None else buffer.clone())
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
        }
        self.state_keys = list(model.state_dict())
        self.ambient = self._ambient()

    @staticmethod
    def _ambient() -> tuple[Any, ...]:
        numpy = np.random.get_state()
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            (numpy[0], numpy[1].tolist(), *numpy[2:]),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )

    def check(self) -> None:
        model = self.model
        assert {name: module.training for name, module in model.named_modules()} == self.modes
        parameters = dict(model.named_parameters())
        assert parameters.keys() == self.parameters.keys()
        for name, (parameter, value, requires_grad, grad, grad_value) in self.parameters.items():
            assert parameters[name] is parameter
            assert torch.equal(parameter, value)
            assert parameter.requires_grad == requires_grad
            assert parameter.grad is grad
            assert grad is None or torch.equal(grad, grad_value)
        buffers = {
            (name, key): buffer for name, module in model.named_modules() for key, buffer in module._buffers.items()
        }
        assert buffers.keys() == self.buffers.keys()
        for key, (buffer, value) in self.buffers.items():
            assert buffers[key] is buffer, key
            assert buffer is None or torch.equal(buffer, value), key
        assert list(model.state_dict()) == self.state_keys
        for now, then in zip(self._ambient(), self.ambient, strict=True):
            assert now == then

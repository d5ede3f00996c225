"""The tests' own attack: a plain loop of projected gradient ascent on a loss written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pipelines.pipeline import Inputs, tensors
from torch import Tensor, nn

from lightning_wdefense import ThreatModel


def ascend(loss: Callable[[Inputs], Tensor], inputs: Inputs, threat: ThreatModel, steps: int, seed: int = 0) -> Inputs:
    """Inputs in the ball and the bounds that make the loss large."""
    clean = [x.detach() for x in tensors(inputs)]
    noise = torch.Generator().manual_seed(seed)
    found = [_project(x + (torch.rand(x.shape, generator=noise) - 0.5) * _unit(x, threat), x, threat) for x in clean]
    size = threat.eps * (1.0 if steps == 1 else 2.5 / steps)
    for _ in range(steps):
        found = [x.detach().requires_grad_() for x in found]
        with torch.enable_grad():
            value = loss(found[0] if isinstance(inputs, Tensor) else found).sum()
        moved = []
        for x, center, gradient in zip(found, clean, torch.autograd.grad(value, found), strict=True):
            moved.append(
                _project(x + size / threat.eps * _unit(x, threat) * _direction(gradient, threat), center, threat)
            )
        found = moved
    found = [x.detach() for x in found]
    return found[0] if isinstance(inputs, Tensor) else found


def _project(x: Tensor, center: Tensor, threat: ThreatModel) -> Tensor:
    x = x.detach()
    if threat.norm == "linf":
        x = torch.maximum(torch.minimum(x, center + _unit(x, threat)), center - _unit(x, threat))
    else:
        length = (x - center).flatten(1).norm(dim=1).clamp_min(1e-12)
        x = center + (x - center) * _rows((threat.eps / length).clamp_max(1), x)
    if threat.bounds is not None:
        low, high = ((bound - _channel(threat.mean, 0.0, x)) / _channel(threat.std, 1.0, x) for bound in threat.bounds)
        x = torch.maximum(torch.minimum(x, high), low)
    return x


def _direction(gradient: Tensor, threat: ThreatModel) -> Tensor:
    if threat.norm == "linf":
        return gradient.sign()
    return gradient / _rows(gradient.flatten(1).norm(dim=1).clamp_min(1e-12), gradient)


def _unit(x: Tensor, threat: ThreatModel) -> Tensor:
    """The radius in the model's units."""
    return threat.eps / _channel(threat.std, 1.0, x)


def _channel(values: Any, default: float, x: Tensor) -> Tensor:
    """One value a channel, to broadcast along dimension 1."""
    return torch.tensor(default) if values is None else torch.tensor(values).reshape(1, -1, *[1] * (x.ndim - 2))


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode, each submodule's own flag put back after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def attacked(pipeline: Any, module: nn.Module, batch: Any, steps: int = 15, training: bool = False) -> Inputs:
    """The inputs of the batch after the tests' own attack."""
    loss = (pipeline.train_loss if training else None) or pipeline.true_loss
    inputs = (pipeline.train_inputs if training else None) or pipeline.clean_inputs
    with evaluating(module):
        return ascend(lambda x: loss(module, batch, x), inputs(module, batch), pipeline.threat, steps)


def scores(pipeline: Any, module: nn.Module, loader: Any, steps: int = 15) -> tuple[float, float]:
    """The score on clean and on attacked inputs, averaged over the samples of the loader."""
    clean, robust, seen = 0.0, 0.0, 0
    for batch in loader:
        with evaluating(module), torch.no_grad():
            inputs = pipeline.clean_inputs(module, batch)
        worst = attacked(pipeline, module, batch, steps)
        size = len(tensors(inputs)[0])
        with evaluating(module), torch.no_grad():
            clean += size * pipeline.score(module, batch, inputs)
            robust += size * pipeline.score(module, batch, worst)
        seen += size
    return clean / seen, robust / seen

"""What broken defences are made of."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


class Before(nn.Module):
    """A function in front of a model."""

    def __init__(self, function, model):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, x):
        return self.model(self.function(x))


class After(nn.Module):
    """A function behind a model."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model(x))


def quantised(x: Tensor) -> Tensor:
    return (x * 3).round() / 3


def thermometer(x: Tensor) -> Tensor:
    return torch.stack([(x > level).float() for level in (0.2, 0.4, 0.6, 0.8)]).mean(0)


def clamped(x: Tensor) -> Tensor:
    """As ``x.clamp(0, 1)`` in recent versions of PyTorch, and in all of them: at 0 and at 1 the gradient is zero."""
    return nn.functional.hardtanh(x, 0.0, 1.0)


def through_integers(x: Tensor) -> Tensor:
    return (x * 4).to(torch.uint8).float() / 4


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.round(x.detach().numpy() * 3) / 3)


def cosine_transform(size: int = 8) -> Tensor:
    n = torch.arange(size)
    basis = torch.cos(math.pi / size * (n + 0.5) * n.unsqueeze(1)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def jpeg(x: Tensor) -> Tensor:
    """Rounds the coefficients of the cosine transform, coarsely those of high frequencies."""
    basis = cosine_transform(x.shape[-1]).to(x)
    n = torch.arange(x.shape[-1])
    step = 0.4 + 0.1 * (n + n.unsqueeze(1))
    coefficients = basis @ x @ basis.T
    return basis.T @ ((coefficients / step).round() * step) @ basis


def noisy(level: float):
    return lambda x: x + level * torch.randn_like(x)


def median(x: Tensor) -> Tensor:
    """A purifier: the mean of a pixel and of the median around it."""
    around = nn.functional.unfold(nn.functional.pad(x, (1, 1, 1, 1), "reflect"), 3).reshape(len(x), 9, *x.shape[-2:])
    return (x + around.median(1, keepdim=True).values) / 2


def purified_without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        purified = quantised(median(x))
    return purified


def detached(x: Tensor) -> Tensor:
    return x.detach()


class Winners(nn.Module):
    """k-winners-take-all: keeps the largest activations (Xiao et al., 2020)."""

    share = 0.15

    def forward(self, x):
        flat = x.flatten(1)
        threshold = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1]
        keep = flat >= threshold.unsqueeze(1)
        return (flat * keep).view_as(x)


class Shattered(torch.autograd.Function):
    """The identity with a gradient of noise."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)) * gradient.abs().mean()


class Smoothed(nn.Module):
    """The mean of the probabilities over noisy copies, always the same noise or new noise at each call."""

    def __init__(self, model, sigma, copies=12, fixed=True):
        super().__init__()
        self.model, self.sigma, self.copies, self.fixed = model, sigma, copies, fixed

    def forward(self, x):
        generator = torch.Generator().manual_seed(0) if self.fixed else None
        noise = torch.randn((self.copies, 1, *x.shape[1:]), generator=generator) * self.sigma
        logits = self.model((x + noise).flatten(0, 1)).log_softmax(1).view(self.copies, len(x), -1)
        return logits.logsumexp(0) - math.log(self.copies)

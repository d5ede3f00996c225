"""Small models of digits, trained once a process."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_wdefense import Recipe, ThreatModel

THREAT = ThreatModel(eps=0.15)
TRAIN = 1297


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def held_out(count: int) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[TRAIN : TRAIN + count], labels[TRAIN : TRAIN + count]


def network(activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), activation(), nn.Conv2d(12, 24, 3, stride=2, padding=1), activation(),
        nn.Flatten(), nn.Linear(24 * 16, 64), activation(), nn.Dropout(dropout), nn.Linear(64, 10),
    )  # fmt: skip


def fitted(
    model: nn.Module,
    recipe: str = "standard",
    epochs: int = 8,
    threat: ThreatModel = THREAT,
    noise: float = 0.0,
    smoothing: float = 0.0,
    seed: int = 0,
):
    """The model after a plain loop with one of our recipes; ``noise`` is added to the inputs, ``smoothing`` to the labels."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    steps = TRAIN // 64 + 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fails under AutoAttack.*")
        defense = Recipe.named(recipe, threat).bind(model, seed=seed, warmup_steps=2 * steps)
    model.train()
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(TRAIN, generator=generator)
        chosen = order[step % steps * 64 :][:64]
        batch = images[chosen] + noise * torch.randn(images[chosen].shape, generator=generator)
        target = labels[chosen]
        if smoothing:
            target = F.one_hot(target, 10) * (1 - smoothing) + smoothing / 10
        optimizer.zero_grad()
        defense(batch, target, step=step).loss.backward()
        optimizer.step()
    defense.detach()
    return model.eval().requires_grad_(True)


@functools.cache
def trained(recipe: str = "standard", seed: int = 0, make=network, **options) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fitted(make(), recipe, seed=seed, **options)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def linear_model(seed: int = 0) -> nn.Module:
    return trained(seed=seed, make=linear)

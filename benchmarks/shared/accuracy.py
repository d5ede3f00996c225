"""Which images a model classifies correctly, clean or attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.shared.data import Images
from lightning_wdefense.attacks import Attack, worst_case

CHUNK = 500
"""Images that are attacked at once in validation and tests."""


def right(model: nn.Module, images: Images, device: str) -> Tensor:
    """Which clean images are classified correctly."""
    with torch.no_grad():
        parts = [model(x.to(device)).argmax(1).cpu() for x in images.x.split(CHUNK)]
    return torch.cat(parts) == images.y


def left(model: nn.Module, attack: Attack, images: Images, open_: Tensor, device: str) -> Tensor:
    """Which of the open images the attack does not break."""
    survivors = torch.zeros_like(open_)
    for part in open_.nonzero().squeeze(1).split(CHUNK):
        if len(part):
            result = worst_case(model, {attack.name: attack}, images.x[part].to(device), images.y[part].to(device))
            survivors[part] = result.robust.cpu()
    return survivors


def fooled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(1024)]) != y

"""What the benchmarks share: the machine's name, and intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def processor(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return next(iter(models), platform.machine())


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    name = processor(device)
    return name if device == "cuda" else f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def command(script: str, argv: Sequence[str]) -> str:
    """The command for a report: without the folders, which are each machine's own."""
    words, rest = [f"python benchmarks/{script}"], iter(argv)
    for word in rest:
        if word in ("--work", "--output"):
            next(rest)
        elif word == "--data":
            next(rest)
            words.append("--data folder")
        else:
            words.append(word)
    return " ".join(words)


def hand_written_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """What a careful user would write into a step: so many passes in eval mode, the sign and the clamps, and train mode again."""
    model.eval()
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        loss = F.cross_entropy(model(adversarial), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        with torch.no_grad():
            adversarial = x + (adversarial + 2.5 * eps / steps * gradient.sign() - x).clamp(-eps, eps)
            adversarial = adversarial.clamp(0, 1)
    model.train()
    return adversarial


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], draws: int = 2000) -> list[float]:
    """95% bootstrap interval of the ratio of medians."""
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.tensor(side)[torch.randint(len(side), (draws, len(side)), generator=generator)] for side in (ours, theirs)
    ]
    ratios = sides[0].median(1).values / sides[1].median(1).values
    return [round(float(q), 4) for q in torch.quantile(ratios, torch.tensor([0.025, 0.975]))]

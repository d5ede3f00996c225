"""PGD as a user would write it by hand, which ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

"""Moves the mass of images between neighbouring pixels (flows), and draws random flows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_flow(images: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Move mass between neighbouring pixels; each channel keeps its own.

    Args:
        images: pixel masses ``(N, C, H, W)``.
        horizontal: mass that moves from a pixel to its right neighbour, ``(N, C, H, W - 1)``; negative for the other direction.
        vertical: mass that moves from a pixel to the pixel below, ``(N, C, H - 1, W)``; negative for the other direction.

    Returns:
        The images ``(N, C, H, W)`` after the flow. Any image with the same mass per channel can be reached. For masses that are not
        negative, the smallest ``|horizontal|_1 + |vertical|_1`` that reaches it is the 1-Wasserstein distance with Manhattan ground
        distance.

    References:
        Ling and Okada, "An efficient earth mover's distance algorithm for robust histogram comparison", 2007. Levine and Feizi,
        "Wasserstein smoothing: certified robustness against Wasserstein adversarial attacks", AISTATS 2020.

    Example:
        >>> import torch
        >>> apply_flow(torch.tensor([[[[1.0, 0.0, 0.0]]]]), torch.tensor([[[[0.7, 0.2]]]]), torch.empty(1, 1, 0, 3))
        tensor([[[[0.3000, 0.5000, 0.2000]]]])
    """
    images = images - F.pad(horizontal, (0, 1)) + F.pad(horizontal, (1, 0))
    return images - F.pad(vertical, (0, 0, 0, 1)) + F.pad(vertical, (0, 0, 1, 0))


def laplace_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Laplace noise of scale 1 (standard deviation ``sqrt(2)``), in the dtype and on the device of ``like``."""
    one, other = (
        torch.empty(shape, dtype=like.dtype, device=generator.device).exponential_(generator=generator)
        for _ in range(2)
    )
    return (one - other).to(like.device)

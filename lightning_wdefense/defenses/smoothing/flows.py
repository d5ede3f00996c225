"""Images whose mass flows between neighbouring pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_flow(images: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Move mass between neighbouring pixels; each channel keeps its own.

    Args:
        images: ``(N, C, H, W)``.
        horizontal: mass that flows from a pixel to its right neighbour, ``(N, C, H, W - 1)``; negative for the way back.
        vertical: mass that flows from a pixel to the one below, ``(N, C, H - 1, W)``.

    Returns:
        The images afterwards. Any image of the same masses can be reached, and the least ``|horizontal|_1 + |vertical|_1`` that does it is
        the 1-Wasserstein distance with Manhattan ground distance, if the masses are not negative.

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

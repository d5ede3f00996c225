"""How several samples share one perturbation budget, the mean of the p-th powers of their lengths."""

from __future__ import annotations

import torch
from torch import Tensor

NEARLY_POINTWISE = 1.1
"""Below this ratio of the farthest that one sample can go to eps, the budget is nearly one of each sample."""


def first_order_shares(slopes: Tensor, p: float) -> Tensor:
    """The lengths that raise a linear loss the most, if the mean of their p-th powers is 1.

    Sample ``i`` gets ``(s_i / S)^(q - 1)`` with ``1/p + 1/q = 1`` and ``S = (mean_i s_i^q)^(1/q)``. With ``p = 1`` the samples with the
    largest slope get everything, in equal parts. The larger ``p``, the more equal are the lengths. A sample without a slope gets none.

    Args:
        slopes: how much the loss of each sample grows per unit of length, ``(N,)``, not negative, in float64.
        p: order of the budget, at least 1 and finite.

    Returns:
        Lengths ``(N,)``; zeros if all slopes are zero.

    References:
        Bai, He, Jiang, Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023, section 4.

    Example:
        >>> first_order_shares(torch.tensor([3.0, 4.0], dtype=torch.float64), 2.0)
        tensor([0.8485, 1.1314], dtype=torch.float64)
    """
    largest = slopes.amax()
    relative = slopes / largest.clamp_min(
        torch.finfo(slopes.dtype).tiny
    )  # powers of slopes would overflow or underflow
    if p == 1:
        top = (relative == 1).to(slopes.dtype)
        shares = top / top.mean().clamp_min(1 / len(slopes))
    else:
        q = p / (p - 1)
        mean = relative.pow(q).mean().clamp_min(torch.finfo(slopes.dtype).tiny)
        shares = relative.pow(q - 1) / mean.pow(1 / p)
    return shares.where(slopes > 0, 0)


def within_budget(lengths: Tensor, eps: float, p: float) -> Tensor:
    """Lengths whose mean p-th power is at most ``eps^p``; lengths inside of the budget are returned unchanged.

    - ``p = 1``: the nearest lengths inside of the budget. The same amount is subtracted from each, down to 0 (soft thresholding).
    - ``p > 1``: all are multiplied by one factor. For ``p = 2`` this is the nearest point, and for any ``p`` it is the nearest in the
      Wasserstein distance of that order. It keeps the ratios, which :func:`first_order_shares` made optimal.
    - Very large ``p``: with the whole budget to itself a sample can go ``eps N^(1/p)``. If that is less than ``1.1 eps``, lengths above it
      are cut to it before. So in the limit each length is cut to ``eps``, as in PGD.

    Args:
        lengths: ``(N,)``, not negative, in float64.
        eps: the budget.
        p: order of the budget, at least 1 and finite.

    Example:
        >>> within_budget(torch.tensor([3.0, 1.0], dtype=torch.float64), 1.0, 1.0)
        tensor([2., 0.], dtype=torch.float64)
        >>> within_budget(torch.tensor([4.0, 3.0, 0.0, 0.0], dtype=torch.float64), 1.0, 2.0)
        tensor([1.6000, 1.2000, 0.0000, 0.0000], dtype=torch.float64)
    """
    if p == 1:
        return _soft_threshold(lengths, eps)
    farthest = len(lengths) ** (1 / p)
    if farthest < NEARLY_POINTWISE:
        lengths = lengths.clamp_max(eps * farthest)
    largest = lengths.amax().clamp_min(torch.finfo(lengths.dtype).tiny)
    mean = largest * (lengths / largest).pow(p).mean().pow(1 / p)
    return lengths * (eps / mean.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp_max(1.0)


def _soft_threshold(lengths: Tensor, eps: float) -> Tensor:
    ordered = lengths.sort(descending=True).values
    excess = ordered.cumsum(0) - eps * len(lengths)
    counts = torch.arange(1, len(lengths) + 1, device=lengths.device, dtype=lengths.dtype)
    # The threshold that the first k samples would need; of all k the right one gives the largest.
    threshold = (excess / counts).amax().clamp_min(0)
    return (lengths - threshold).clamp_min(0)

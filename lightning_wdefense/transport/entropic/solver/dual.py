"""The dual objective of entropic transport, balanced or with a price ``rho`` of creating and destroying mass."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest


def density(potential: Tensor, rho: float | None) -> Tensor:
    """Mass transported at each point, as a share of its weight: all of it, unless the transport is unbalanced."""
    return torch.ones_like(potential) if rho is None else (-potential / rho).exp()


def price(potential: Tensor, rho: float | None) -> Tensor:
    """What a unit of weight adds to the dual value."""
    return potential if rho is None else -rho * (-potential / rho).expm1()


def semi_dual(f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float | Tensor, rho: float | None) -> Tensor:
    """Dual value ``(...)`` where ``f`` is the answer to ``g``, so that the mass of the plan is that of its rows.

    In float64, where the device has it: its error is the square of that of the potentials. ``eps`` is a number, or ``(...)``.
    """
    dtype = widest(a.device)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    mass = transported = wide_a.sum(-1)
    if rho is not None:
        f, g = f.to(dtype), g.to(dtype)
        transported = (wide_a * density(f, rho)).sum(-1)
    entropy = transported - mass * wide_b.sum(-1)
    return (wide_a * price(f, rho)).sum(-1) + (wide_b * price(g, rho)).sum(-1) - eps * entropy

"""Directions to project on: samples of the uniform distribution on the sphere, or those that the caller brings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense.transport.clouds.measures import check_device, check_finite, check_float, usable


def random_directions(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """``(n, dim)`` independent ones, in float64 on the CPU."""
    return F.normalize(_gaussians((n, dim), generator), dim=-1)


def orthogonal_directions(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """``(n, dim)`` in blocks of at most ``dim`` orthogonal ones, each uniform by itself, in float64 on the CPU."""
    width = min(n, dim)
    basis, triangle = torch.linalg.qr(_gaussians((-(-n // width), dim, width), generator))
    # QR is unique, and the basis uniform (of Haar measure), only if the diagonal of the triangle is positive.
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (basis * signs.unsqueeze(-2)).mT.reshape(-1, dim)[:n]


def _gaussians(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # In one dtype, so that float32 and float64 clouds meet the same directions; there is no float64 on MPS.
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to("cpu", torch.float64)


def check_directions(directions: Tensor) -> None:
    """An error unless these are some vectors ``(K, D)`` that have a direction."""
    check_float("directions", directions)
    if directions.ndim != 2 or 0 in directions.shape:
        raise ValueError(f"directions must have shape (K, D) with K and D at least 1, got {tuple(directions.shape)}.")
    check_finite("directions", directions)
    zero = (directions == 0).all(-1)
    if bool(zero.any()):
        raise ValueError(f"directions must not be zero, row {int(zero.nonzero()[0])} is.")


def read_directions(directions: Tensor, points: Tensor) -> Tensor:
    """The caller's directions as unit vectors ``(1, K, D)`` in the dtype of the points ``(B, N, D)``."""
    if directions.shape[-1] != points.shape[-1]:
        raise ValueError(
            f"directions must have shape (K, {points.shape[-1]}) for points of {points.shape[-1]} dimensions, got "
            f"{tuple(directions.shape)}."
        )
    check_device("directions", directions, points)
    directions = usable(directions.to(points.dtype))
    # By the largest entry first, so that the squares of the norm neither overflow nor vanish.
    directions = directions / directions.detach().abs().amax(-1, keepdim=True)
    return F.normalize(directions, dim=-1).unsqueeze(0)

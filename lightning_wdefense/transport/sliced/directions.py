"""Projection directions: random directions, uniform on the sphere, or the caller's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_wdefense._dtype import widest
from lightning_wdefense.transport.clouds.measures import check_device, check_finite, check_float, usable


def random_directions(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent unit vectors, uniform on the sphere: ``(n, dim)`` in float64 on the CPU."""
    return F.normalize(_gaussians((n, dim), generator), dim=-1)


def orthogonal_directions(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit vectors in orthogonal blocks of at most ``dim``, each uniform on the sphere: ``(n, dim)`` in float64 on the CPU."""
    width = min(n, dim)
    basis, triangle = torch.linalg.qr(_gaussians((-(-n // width), dim, width), generator))
    # QR is unique, and the basis is uniform (Haar measure), only if the diagonal of the triangular factor is positive.
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (basis * signs.unsqueeze(-2)).mT.reshape(-1, dim)[:n]


def _gaussians(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # In one dtype, so that float32 and float64 clouds get the same directions.
    dtype = widest(generator.device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to("cpu", torch.float64)


def check_directions(directions: Tensor) -> None:
    """Raise an error unless ``directions`` are finite vectors ``(K, D)``, none of them zero.

    Raises:
        TypeError: if they are not a float tensor.
        ValueError: if the shape is wrong, a value is not finite, or a vector is zero.
    """
    check_float("directions", directions)
    if directions.ndim != 2 or 0 in directions.shape:
        raise ValueError(f"directions must have shape (K, D) with K and D at least 1, got {tuple(directions.shape)}.")
    check_finite("directions", directions)
    zero = (directions == 0).all(-1)
    if bool(zero.any()):
        raise ValueError(f"directions must not be zero, but row {int(zero.nonzero()[0])} is zero: remove it.")


def read_directions(directions: Tensor, points: Tensor) -> Tensor:
    """The caller's directions ``(K, D)`` as unit vectors ``(1, K, D)``, in the dtype of the points ``(B, N, D)``.

    Raises:
        ValueError: if their dimension or device is not that of the points.
    """
    if directions.shape[-1] != points.shape[-1]:
        raise ValueError(
            f"directions must have shape (K, {points.shape[-1]}) for points of {points.shape[-1]} dimensions, got "
            f"{tuple(directions.shape)}."
        )
    check_device("directions", directions, points)
    directions = usable(directions.to(points.dtype))
    # Divided by the largest entry first, so that the squares in the norm neither overflow nor underflow.
    directions = directions / directions.detach().abs().amax(-1, keepdim=True)
    return F.normalize(directions, dim=-1).unsqueeze(0)

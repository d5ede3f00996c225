"""Local transport plans, which move the mass of pixels to neighbouring pixels, and their constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Neighbourhood(NamedTuple):
    """The pixels that mass may move to: a square around its own pixel, with the cost per unit of mass.

    Attributes:
        size: number of pixels along a side, odd.
        costs: ``distance^p`` of each of the ``K = size^2`` pixels, distances in pixels; 0 in the centre.
        rings: the indices of the pixels at each distance, nearest first.
    """

    size: int
    costs: tuple[float, ...]
    rings: tuple[tuple[int, ...], ...]

    @property
    def centre(self) -> int:
        """The index of the centre, the pixel itself."""
        return len(self.costs) // 2


@lru_cache(maxsize=16)
def square(size: int, p: int) -> Neighbourhood:
    """The neighbourhood of ``size`` by ``size`` pixels, with cost ``distance^p`` for the Euclidean distance in pixels."""
    reach = size // 2
    squares = [i * i + j * j for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    rings = tuple(tuple(k for k, each in enumerate(squares) if each == square) for square in sorted(set(squares)))
    return Neighbourhood(size, tuple(math.sqrt(square) ** p for square in squares), rings)


@dataclass(frozen=True)
class LocalTransport:
    """The constraints on the transport plans of a batch of images ``(N, C, H, W)``.

    A plan ``(N, K, R)`` says how much mass of each pixel moves to each of its ``K`` neighbours. It has rows only for
    pixels with mass: ``R`` is the largest number of them in an image, and images with fewer have rows of mass 0 as
    padding.

    Attributes:
        neighbourhood: the pixels that mass may move to.
        shape: shape of the images, ``(N, C, H, W)``.
        rows: indices of the pixels with mass in the flattened image, ``(N, R)``.
        masses: mass of these pixels, ``(N, R)``.
        budget: the largest transport cost of each image, in units of mass times ``distance^p``, ``(N,)``.
        capacity: largest value of each pixel, ``(N, C * H * W)``; ``None`` without a limit.
        neighbours: indices of each pixel's neighbours in the flattened image with a margin around it, ``(N, K, R)``.
        inside: which of these neighbours lie in the image and not in its margin, ``(N, K, R)``.
    """

    neighbourhood: Neighbourhood
    shape: torch.Size
    rows: Tensor
    masses: Tensor
    budget: Tensor
    capacity: Tensor | None
    neighbours: Tensor
    inside: Tensor

    @classmethod
    def of(
        cls, images: Tensor, budget: Tensor, capacity: Tensor | None, neighbourhood: Neighbourhood
    ) -> LocalTransport:
        """The constraints for given images.

        Args:
            images: ``(N, C, H, W)``, without negative values.
            budget: the largest transport cost of each image, ``(N,)``.
            capacity: largest value of each pixel, ``(N, C, H, W)``; ``None`` without a limit.
            neighbourhood: the pixels that mass may move to.
        """
        flat = images.flatten(1)
        count = max(int((flat > 0).sum(1).max()), 1)
        # The pixels with mass first; a stable sort keeps them in order.
        rows = torch.argsort((flat <= 0).to(torch.uint8), dim=1, stable=True)[:, :count]
        reach = neighbourhood.size // 2
        places = torch.arange(images[0].numel(), device=images.device).view(1, *images.shape[1:])
        margin = F.pad(places, [reach] * 4, value=-1)
        width = margin.shape[-1]
        steps = torch.arange(-reach, reach + 1, device=images.device)
        steps = (steps.view(-1, 1) * width + steps).flatten()
        home = (margin.flatten() >= 0).nonzero().squeeze(1)
        neighbours = home[rows].unsqueeze(1) + steps.view(1, -1, 1)
        return cls(
            neighbourhood,
            images.shape,
            rows,
            flat.gather(1, rows),
            budget,
            None if capacity is None else capacity.flatten(1),
            neighbours,
            margin.flatten()[neighbours] >= 0,
        )

    def select(self, index: Tensor) -> LocalTransport:
        """The same for some of the images."""
        parts = {name: getattr(self, name)[index] for name in ("rows", "masses", "budget", "neighbours", "inside")}
        capacity = None if self.capacity is None else self.capacity[index]
        return replace(self, shape=torch.Size([len(parts["rows"]), *self.shape[1:]]), capacity=capacity, **parts)

    @property
    def costs(self) -> Tensor:
        """Cost per unit of mass for each neighbour, ``(K, 1)``."""
        return self.masses.new_tensor(self.neighbourhood.costs).unsqueeze(1)

    def identity_plan(self) -> Tensor:
        """The plan ``(N, K, R)`` that moves no mass."""
        plan = torch.zeros_like(self.inside, dtype=self.masses.dtype)
        plan[:, self.neighbourhood.centre] = self.masses
        return plan

    def gather_neighbours(self, values: Tensor) -> Tensor:
        """The value of each neighbour of each pixel: ``(N, C, H, W)`` to ``(N, K, R)``; undefined outside the image."""
        padded = F.pad(values.view(self.shape), [self.neighbourhood.size // 2] * 4).flatten(1)
        return padded.gather(1, self.neighbours.flatten(1)).view_as(self.neighbours)

    def transported(self, plan: Tensor) -> Tensor:
        """The images after the transport by a plan (its second marginal), ``(N, C, H, W)``."""
        reach = self.neighbourhood.size // 2
        count, channels, height, width = self.shape
        padded = plan.new_zeros(count, channels, height + 2 * reach, width + 2 * reach)
        padded.view(count, -1).scatter_add_(1, self.neighbours.flatten(1), plan.flatten(1))
        return padded[:, :, reach : reach + height, reach : reach + width].contiguous()

    def cost(self, plan: Tensor) -> Tensor:
        """The transport cost of a plan, ``(N,)``."""
        return (plan * self.costs).sum((1, 2))


def check_neighbourhood(size: int) -> None:
    """Refuse a neighbourhood whose side is even or below 3.

    Raises:
        ValueError: with the given size.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"neighbourhood must be odd and at least 3, so that it has a centre, got {size}.")


def clamp_rounding(data: Tensor, precision: torch.dtype) -> Tensor:
    """Replace values that rounding in the conversion to data units made slightly negative by 0.

    Args:
        data: images in data units.
        precision: the dtype of the pipeline's inputs.
    """
    rounding = 8 * torch.finfo(precision).eps * max(1.0, float(data.abs().amax()))
    return torch.where(data >= -rounding, data.clamp_min(0), data)


def check_images(data: Tensor, size: int) -> None:
    """Refuse inputs that are not images with mass.

    Args:
        data: the inputs, in data units.
        size: side of the neighbourhood, in pixels.

    Raises:
        ValueError: if the inputs are not ``(N, C, H, W)``, smaller than the neighbourhood, negative, or without mass.
    """
    if data.ndim != 4:
        raise ValueError(
            f"The Wasserstein norm is defined for images (N, C, H, W), got inputs of shape {tuple(data.shape)}: use another norm."
        )
    if size > min(data.shape[2:]):
        raise ValueError(
            f"The images are {data.shape[2]} x {data.shape[3]}, smaller than the neighbourhood, {size} x {size}: lower neighbourhood=."
        )
    if bool((data < 0).any()):
        raise ValueError(
            f"Pixels are mass, which cannot be negative, but in data units they go down to {float(data.min()):.4g}: give ThreatModel the "
            "mean= and std= of the pipeline's normalisation."
        )
    empty = (data.sum((1, 2, 3)) <= 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Images without any mass have nothing to move: samples {empty[:5]} of the batch are 0 in every pixel. Leave them out of the batch."
        )

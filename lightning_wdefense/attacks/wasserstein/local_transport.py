"""Plans that move the mass of pixels to their neighbours: the Wasserstein ball around images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Neighbourhood(NamedTuple):
    """Where mass may go: a square of pixels around its own, and what a unit of it pays.

    Attributes:
        size: pixels along a side, odd.
        costs: ``distance^p`` of each of the ``K = size^2`` places, ``(K,)``; 0 in the centre.
        rings: the places at each distance, nearest first.
    """

    size: int
    costs: tuple[float, ...]
    rings: tuple[tuple[int, ...], ...]

    @property
    def centre(self) -> int:
        """The place of the pixel itself."""
        return len(self.costs) // 2


@lru_cache(maxsize=16)
def square(size: int, p: int) -> Neighbourhood:
    """``size`` by ``size`` pixels with Euclidean distances to the power of ``p``."""
    reach = size // 2
    squares = [i * i + j * j for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    rings = tuple(tuple(k for k, each in enumerate(squares) if each == square) for square in sorted(set(squares)))
    return Neighbourhood(size, tuple(math.sqrt(square) ** p for square in squares), rings)


@dataclass(frozen=True)
class LocalTransport:
    """The plans of a batch of images ``(N, C, H, W)``, and the constraints on them.

    A plan ``(N, K, R)`` says how much of each pixel goes to each of its ``K`` neighbours. Only pixels that have mass are in it: ``R`` is
    the largest number of them in an image, with rows of mass 0 to fill up.

    Attributes:
        near: where mass may go.
        shape: of the images.
        rows: places of the pixels with mass in an image that is flattened, ``(N, R)``.
        masses: theirs, ``(N, R)``.
        budget: what the transport of an image may cost, ``(N,)``.
        room: largest value of each pixel, ``(N, C * H * W)``; ``None`` without a limit.
        neighbours: places of each pixel's neighbours in an image with a margin around it that is flattened, ``(N, K, R)``.
        inside: which of them are in the image and not in its margin, ``(N, K, R)``.
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
        """That of images ``(N, C, H, W)`` without negative values."""
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
        """Of a unit of mass, ``(K, 1)``."""
        return self.masses.new_tensor(self.neighbourhood.costs).unsqueeze(1)

    def identity_plan(self) -> Tensor:
        """The plan that moves nothing."""
        plan = torch.zeros_like(self.inside, dtype=self.masses.dtype)
        plan[:, self.neighbourhood.centre] = self.masses
        return plan

    def gather_neighbours(self, values: Tensor) -> Tensor:
        """The value of each neighbour of each pixel: ``(N, C, H, W)`` to ``(N, K, R)``; anything outside the image."""
        padded = F.pad(values.view(self.shape), [self.neighbourhood.size // 2] * 4).flatten(1)
        return padded.gather(1, self.neighbours.flatten(1)).view_as(self.neighbours)

    def transported(self, plan: Tensor) -> Tensor:
        """The images that a plan makes, ``(N, C, H, W)``."""
        reach = self.neighbourhood.size // 2
        count, channels, height, width = self.shape
        padded = plan.new_zeros(count, channels, height + 2 * reach, width + 2 * reach)
        padded.view(count, -1).scatter_add_(1, self.neighbours.flatten(1), plan.flatten(1))
        return padded[:, :, reach : reach + height, reach : reach + width].contiguous()

    def cost(self, plan: Tensor) -> Tensor:
        """What a plan costs, ``(N,)``."""
        return (plan * self.costs).sum((1, 2))


def check_neighbourhood(size: int) -> None:
    """Refuse a square without a centre.

    Raises:
        ValueError: with what was given.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"neighbourhood must be odd and at least 3, so that it has a centre, got {size}.")


def clamp_rounding(data: Tensor, precision: torch.dtype) -> Tensor:
    """Images in which what the conversion to data units took a little below 0 is 0.

    Args:
        data: images in data units.
        precision: the dtype in which they came.
    """
    rounding = 8 * torch.finfo(precision).eps * max(1.0, float(data.abs().amax()))
    return torch.where(data >= -rounding, data.clamp_min(0), data)


def check_images(data: Tensor, size: int) -> None:
    """Refuse what has no mass to move.

    Raises:
        ValueError: saying what was found.
    """
    if data.ndim != 4:
        raise ValueError(
            f"The Wasserstein norm is one of images (N, C, H, W), got inputs of shape {tuple(data.shape)}."
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
        raise ValueError(f"Images without any mass have nothing to move: samples {empty[:5]} of the batch are all 0.")

"""The random moves of the Square attack: windows of an image, and what is put into them, by norm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.attacks.norms import random_uniform
from lightning_wdefense.attacks.problem import Problem

TILES = 5
"""Number of tiles along each side of an image at the start in L2."""


def image_shape(shape: torch.Size) -> tuple[int, int, int, int]:
    """The shape ``(N, C, H, W)`` in which inputs are seen: vectors as one row, matrices as one channel, video as one high image."""
    features = shape[1:]
    if len(features) >= 3:
        return shape[0], features[0], math.prod(features[1:-1]), features[-1]
    return shape[0], 1, features[0] if len(features) == 2 else 1, features[-1] if features else 1


class Window(NamedTuple):
    """A rectangle of an image."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def random(cls, size: tuple[int, int], image: tuple[int, int], numbers: tuple[float, float]) -> Window:
        """A window at a place that two uniform numbers in [0, 1) choose."""
        top, left = (int(u * (whole - side + 1)) for u, whole, side in zip(numbers, image, size, strict=True))
        return cls(top, left, *size)

    def of(self, images: Tensor) -> Tensor:
        """The window of images ``(N, C, H, W)``, a view."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def window_size(share: float, height: int, width: int, *, odd: bool) -> tuple[int, int]:
    """Height and width of a window with about this share of the image: a square, or longer where the image is too narrow for one.

    Args:
        share: share of the image's area.
        height: of the image.
        width: of the image.
        odd: whether its side is odd and at least 3, where the image is large enough.
    """
    side = max(round(math.sqrt(share * height * width)), 3 if odd else 1)
    side += odd and side % 2 == 0
    if height < side:
        return height, min(width, round(side * side / height))
    return min(height, round(side * side / min(width, side))), min(width, side)


def wave(height: int, width: int, *, upright: bool, like: Tensor) -> Tensor:
    """The pattern ``(height, width)`` of norm 1 that Square puts into a window in L2: a hill in one half, a pit in the other.

    Args:
        height: of the window.
        width: of the window.
        upright: whether the hill is above the pit, or else to its left; a side of length 1 is never halved.
        like: tensor of the wanted dtype and device.
    """
    if height == width == 1:
        return like.new_ones(1, 1)
    if height == 1 or (width > 1 and not upright):
        return wave(width, height, upright=True, like=like).T
    pattern = torch.cat([_hill(height // 2, width, like), -_hill(height - height // 2, width, like)])
    return pattern / pattern.norm()


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """Sums of rectangles around the centre: the one of radius ``r`` has the height ``1 / (r + 1)^2``."""
    rows, columns = ((torch.arange(side, device=like.device) - side // 2).abs() for side in (height, width))
    steps = 1 / torch.arange(1, max(height, width) // 2 + 2, device=like.device, dtype=like.dtype) ** 2
    return steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows.unsqueeze(1), columns.unsqueeze(0))]


class Moves(ABC):
    """What Square tries, for the samples of a problem; images are ``(N, C, H, W)``, in data units.

    Args:
        problem: the samples.
    """

    odd: ClassVar[bool]
    """Whether the sides of windows are odd."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.eps = problem, problem.threat.eps
        self.shape = image_shape(problem.data.shape)
        self.clean = problem.data.reshape(self.shape)

    @abstractmethod
    def start(self) -> Tensor:
        """The images to start from."""

    @abstractmethod
    def propose(self, images: Tensor, size: tuple[int, int], numbers: tuple[float, ...]) -> Tensor:
        """New images, which differ from these in windows of this size at places that uniform numbers choose."""

    def _signs(self, *shape: int) -> Tensor:
        return (random_uniform(self.clean.new_empty(shape), self.problem.generator) < 0.5) * 2.0 - 1.0

    def _boxed(self, images: Tensor) -> Tensor:
        data = self.problem.data
        return self.problem.box.clamp_(images.reshape(data.shape)).reshape(self.shape)


class Corners(Moves):
    """In L-infinity every value lies at a limit of the ball; a window gets one side for each sample and channel."""

    odd = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        low, high = problem.box.around(problem.data, self.eps)
        assert low is not None
        assert high is not None
        self._low, self._high = low.reshape(self.shape), high.reshape(self.shape)

    def start(self) -> Tensor:
        """Vertical stripes."""
        n, channels, _, width = self.shape
        return torch.where(self._signs(n, channels, 1, width) > 0, self._high, self._low)

    def propose(self, images: Tensor, size: tuple[int, int], numbers: tuple[float, ...]) -> Tensor:
        """One window on one of its sides."""
        n, channels, height, width = self.shape
        window, images = Window.random(size, (height, width), (numbers[0], numbers[1])), images.clone()
        up = self._signs(n, channels, 1, 1) > 0
        window.of(images).copy_(torch.where(up, window.of(self._high), window.of(self._low)))
        return images


class Waves(Moves):
    """In L2 a window takes over the length of the perturbation in it and in a second window, and what the ball has left."""

    odd = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._waves: dict[tuple[int, int, bool], Tensor] = {}

    def _wave(self, size: tuple[int, int], upright: bool) -> Tensor:
        key = *size, upright
        if key not in self._waves:
            self._waves[key] = wave(*size, upright=upright, like=self.clean)
        return self._waves[key]

    def start(self) -> Tensor:
        """Tiles of waves."""
        n, channels, height, width = self.shape
        delta = torch.zeros_like(self.clean)
        size = max(height // TILES, 1), max(width // TILES, 1)
        tops, lefts = (
            range((whole % side) // 2, whole - side + 1, side)
            for whole, side in zip((height, width), size, strict=True)
        )
        upright = self._signs(len(tops) * len(lefts)).tolist()
        for index, (top, left) in enumerate((top, left) for top in tops for left in lefts):
            tile = Window(top, left, *size).of(delta)
            tile.copy_(self._wave(size, upright[index] > 0) * self._signs(n, channels, 1, 1))
        return self._at_radius(delta)

    def propose(self, images: Tensor, size: tuple[int, int], numbers: tuple[float, ...]) -> Tensor:
        """Two windows: the first gets a wave, added to what it has and scaled; the second is cleared."""
        n, channels, height, width = self.shape
        window, other = (Window.random(size, (height, width), (numbers[k], numbers[k + 1])) for k in (0, 2))
        delta = images - self.clean
        unused = (self.eps**2 - _energy(delta).sum(1, keepdim=True)).clamp_min(0) / channels
        before = window.of(delta).clone()
        window.of(delta).zero_()
        # Of the second window without what the first has of it.
        length = (unused + _energy(before) + _energy(other.of(delta))).sqrt()
        other.of(delta).zero_()
        new = self._wave(size, numbers[4] < 0.5) * self._signs(n, channels, 1, 1)
        new = new + before / _energy(before).sqrt().clamp_min(1e-12)
        window.of(delta).copy_(new / _energy(new).sqrt().clamp_min(1e-12) * length)
        return self._at_radius(delta)

    def _at_radius(self, delta: Tensor) -> Tensor:
        """The clean images plus perturbations of length ``eps``, inside the bounds."""
        length = _energy(delta).sum(1, keepdim=True).sqrt().clamp_min(1e-12)
        return self._boxed((delta * (self.eps / length)).add_(self.clean))


def _energy(delta: Tensor) -> Tensor:
    """The square of the length of each channel, ``(N, C, 1, 1)``."""
    return delta.square().sum((2, 3), keepdim=True)


MOVES: dict[str, type[Moves]] = {"linf": Corners, "l2": Waves}
"""By norm."""

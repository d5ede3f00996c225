"""Anderson (1965) extrapolation of a fixed-point iteration from its last steps."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.constants import MEMORY, RIDGE, TINY
from lightning_wdefense.transport.entropic.solver.arrays import Array, array, solve


class Anderson:
    """History of an iteration on vectors ``(..., M)``, every problem of a batch by itself.

    The image of a point less the combination of past differences of images that goes with the combination of past differences
    of residuals that best cancels the residual, in the norm that ``scale`` weights.

    Args:
        scale: square roots of the weights of the coordinates, ``(..., M)``.
        xp: the module of the vectors.
    """

    def __init__(self, scale: Tensor, xp: ModuleType) -> None:
        *batch, size = scale.shape
        identity = torch.eye(MEMORY, dtype=scale.dtype, device=scale.device)
        self._xp, self._scale = xp, array(xp, scale)
        self._residuals, self._images = (array(xp, scale.new_zeros(*batch, MEMORY, size)) for _ in range(2))
        self._gram = array(xp, identity.expand(*batch, MEMORY, MEMORY).clone())
        self._rows = [
            tuple(history[..., i, :] for history in (self._residuals, self._images, self._gram)) for i in range(MEMORY)
        ]
        self._columns = [self._gram[..., i] for i in range(MEMORY)]
        self._identity, self._ridge = array(xp, identity), array(xp, 1 + RIDGE * identity)
        self._tiny = TINY * self._identity
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self._length = 0
        self._last: tuple[Array, Array] | None = None
        self._residuals[...] = 0
        self._gram[...] = self._identity

    def forget(self, problems: bool | Array, point: Array, residual: Array) -> None:
        """Begin anew at ``point`` with the problems where ``problems``, ``(B,)`` for a batch, is true."""
        here, last, where = (residual * self._scale, point + residual), self._last, self._xp.where
        if isinstance(problems, bool):
            self.reset()
        else:
            forgotten = problems[:, None, None]
            self._residuals *= ~forgotten
            self._gram[...] = where(forgotten, self._identity, self._gram)
            if last is not None:
                here = where(forgotten[:, 0], here[0], last[0]), where(forgotten[:, 0], here[1], last[1])
        self._last = here

    def shift(self, offset: Array) -> None:
        """Count the points from ``offset`` on."""
        if self._last is not None:
            self._last = self._last[0], self._last[1] - offset

    def next(self, point: Array, residual: Array) -> Array:
        """Where to go from ``point``, whose image is ``point + residual``."""
        scaled, image = residual * self._scale, point + residual
        last, self._last = self._last, (scaled, image)
        if last is None:
            return image
        slot = self._length % MEMORY
        self._length += 1
        residuals, images, products = self._rows[slot]
        self._xp.subtract(scaled, last[0], out=residuals)
        self._xp.subtract(image, last[1], out=images)
        products[...] = self._columns[slot][...] = _dot(self._residuals, residuals)
        mixture = solve(self._xp, self._gram * self._ridge + self._tiny, _dot(self._residuals, scaled))
        return image - _dot(self._images.swapaxes(-1, -2), mixture)


def _dot(matrix: Array, vector: Array) -> Array:
    return matrix @ vector if vector.ndim == 1 else (matrix @ vector[..., None])[..., 0]

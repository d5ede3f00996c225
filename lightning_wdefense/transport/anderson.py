"""Anderson (1965) extrapolation of a fixed-point iteration from its last steps."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 5
"""Steps that are combined. More of them do not save iterations, and mislead at small blurs."""

RIDGE = 1e-6
"""Share by which the diagonal of the Gram matrix grows, so that float32 can solve with it."""

TINY = 1e-30
"""Added to it too, for steps after which nothing changed."""


class Anderson:
    """History of an iteration on vectors ``(..., M)``, every problem of a batch by itself.

    The image of a point less the combination of past differences of images that goes with the combination of past differences
    of residuals that best cancels the residual, in the norm that ``scale`` weights.

    Args:
        scale: square roots of the weights of the coordinates, ``(..., M)``.
    """

    def __init__(self, scale: Tensor) -> None:
        *batch, size = scale.shape
        self._scale = scale
        self._residuals = scale.new_zeros(*batch, MEMORY, size)
        self._images = scale.new_zeros(*batch, MEMORY, size)
        self._identity = torch.eye(MEMORY, dtype=scale.dtype, device=scale.device)
        self._gram = self._identity.expand(*batch, MEMORY, MEMORY).clone()
        self._rows = [each.unbind(-2) for each in (self._residuals, self._images, self._gram)]
        self._columns = self._gram.unbind(-1)
        self._ridge = 1 + RIDGE * self._identity
        self._tiny = TINY * self._identity
        self.reset()

    def reset(self) -> None:
        """Forget all steps, and where the last one ended."""
        self._length = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self.keep(False)

    def keep(self, problems: bool | Tensor) -> None:
        """Forget the steps of all problems but those where ``problems`` ``(B,)`` is true."""
        if isinstance(problems, Tensor):
            kept = problems[:, None, None]
            self._residuals.mul_(kept)
            self._gram.copy_(torch.where(kept, self._gram, self._identity))
        elif not problems:
            self._residuals.zero_()
            self._gram.copy_(self._identity)

    def shift(self, offset: Tensor) -> None:
        """Count the points from ``offset`` on."""
        if self._last is not None:
            self._last = self._last[0], self._last[1] - offset

    def next(self, point: Tensor, residual: Tensor) -> Tensor:
        """Where to go from ``point``, whose image is ``point + residual``."""
        scaled, image = residual * self._scale, point + residual
        last, self._last = self._last, (scaled, image)
        if last is None:
            return image
        slot = self._length % MEMORY
        self._length += 1
        residuals, images, rows = (each[slot] for each in self._rows)
        torch.sub(scaled, last[0], out=residuals)
        torch.sub(image, last[1], out=images)
        products = _dot(self._residuals, residuals)
        rows.copy_(products)
        self._columns[slot].copy_(products)
        right = _dot(self._residuals, scaled)
        mixture = torch.linalg.solve_ex(torch.addcmul(self._tiny, self._gram, self._ridge), right)[0]
        return image - _combine(self._images, mixture)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    return torch.mv(rows, vector) if rows.ndim == 2 else torch.bmm(rows, vector.unsqueeze(-1)).squeeze(-1)


def _combine(rows: Tensor, mixture: Tensor) -> Tensor:
    return torch.mv(rows.t(), mixture) if rows.ndim == 2 else torch.bmm(mixture.unsqueeze(-2), rows).squeeze(-2)

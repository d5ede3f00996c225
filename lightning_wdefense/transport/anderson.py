"""Anderson (1965) extrapolation of a fixed-point iteration from its last steps."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 6
"""Steps that are combined. More of them do not save iterations, and mislead at small blurs."""

RIDGE = 1e-6
"""Share by which the diagonal of the Gram matrix grows, so that float32 can solve with it."""

UNUSED = 1e30
"""Squared length of a residual that is not there yet, so that it gets no weight."""


class Anderson:
    """History of an iteration on vectors ``(..., M)``, every problem of a batch by itself.

    The next point is the combination of past images ``w_k + r_k``, with weights that sum to one, whose combined residual
    is the smallest in the norm that ``scale`` weights.

    Args:
        scale: square roots of the weights of the coordinates, ``(..., M)``.
    """

    def __init__(self, scale: Tensor) -> None:
        *batch, size = scale.shape
        self.scale = scale
        self.residuals = scale.new_zeros(*batch, MEMORY, size)
        self.images = scale.new_zeros(*batch, MEMORY, size)
        self.gram = scale.new_zeros(*batch, MEMORY, MEMORY)
        self._residual_rows = self.residuals.unbind(-2)
        self._image_rows = self.images.unbind(-2)
        self._gram_rows = self.gram.unbind(-2)
        self._gram_columns = self.gram.unbind(-1)
        self._diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        self._ridge = 1 + RIDGE * torch.eye(MEMORY, dtype=scale.dtype, device=scale.device)
        self._empty = UNUSED * torch.eye(MEMORY, dtype=scale.dtype, device=scale.device)
        self._ones = scale.new_ones(*batch, MEMORY)
        self.reset()

    def reset(self) -> None:
        """Forget all problems' steps."""
        self.length = 0
        self.residuals.zero_()
        self.images.zero_()
        self.gram.copy_(self._empty)

    def keep(self, problems: bool | Tensor) -> None:
        """Forget the steps of all problems but those where ``problems`` ``(...)`` is true."""
        if isinstance(problems, bool):
            self.gram.copy_(self.gram if problems else self._empty)
        else:
            self.gram.copy_(torch.where(problems[..., None, None], self.gram, self._empty))

    def shift(self, offset: Tensor) -> None:
        """Count the points from ``offset`` on."""
        self.images.sub_(offset.unsqueeze(-2))

    def next(self, point: Tensor, residual: Tensor) -> Tensor:
        """Where to go from ``point``, whose image is ``point + residual``."""
        slot = self.length % MEMORY
        self.length += 1
        scaled = torch.mul(residual, self.scale, out=self._residual_rows[slot])
        image = torch.add(point, residual, out=self._image_rows[slot])
        products = _dot_rows(self.residuals, scaled)
        self._gram_rows[slot].copy_(products)
        self._gram_columns[slot].copy_(products)
        if self.length < MEMORY:
            self._diagonal[..., self.length :] = UNUSED
        if self.length == 1:
            return image.clone()
        mixture = torch.linalg.solve_ex(self.gram * self._ridge, self._ones)[0]
        mixture /= mixture.sum(-1, keepdim=True)
        return _combine_rows(self.images, mixture)


def _dot_rows(rows: Tensor, vector: Tensor) -> Tensor:
    # Not as batched matrix products, which a GPU may do in TF32.
    return torch.mv(rows, vector) if rows.ndim == 2 else (rows * vector.unsqueeze(-2)).sum(-1)


def _combine_rows(rows: Tensor, mixture: Tensor) -> Tensor:
    return torch.mv(rows.t(), mixture) if rows.ndim == 2 else (rows * mixture.unsqueeze(-1)).sum(-2)

"""Dual potentials that are carried from one call to the next."""

from __future__ import annotations

from torch import Tensor


class WarmStart:
    """A start for the next call of a Sinkhorn function: the dual potential that the last call ended with.

    It is meant for clouds that change slowly, such as those of the steps of an attack or of a gradient descent. Such calls then take
    a few iterations instead of dozens. The result is the same up to the tolerance. Use one object for one sequence of calls.
    Potentials of another shape are ignored. Potentials that are far from the solution cost one pass.

    Example:
        >>> import torch
        >>> from lightning_wdefense.transport import WarmStart, sinkhorn
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> handle = WarmStart()
        >>> first = sinkhorn(x, x.flip(1) + 1, relative_blur=0.05, warm_start=handle).n_iter
        >>> again = sinkhorn(x, x.flip(1) + 1.01, relative_blur=0.05, warm_start=handle).n_iter
        >>> again < first
        True
    """

    def __init__(self) -> None:
        self.potential: Tensor | None = None

    def recall(self, like: Tensor) -> Tensor | None:
        """The last potential ``(B, M)``, if it fits weights ``like``."""
        if self.potential is None or self.potential.shape != like.shape or self.potential.device != like.device:
            return None
        return self.potential.to(like.dtype)

    def __repr__(self) -> str:
        held = "empty" if self.potential is None else f"potential of shape {tuple(self.potential.shape)}"
        return f"WarmStart({held})"

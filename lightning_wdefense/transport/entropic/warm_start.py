"""Potentials carried from one call to the next."""

from __future__ import annotations

from torch import Tensor


class WarmStart:
    """Where the next call of a Sinkhorn function starts: at the potential that the last one ended with.

    For calls on slowly changing clouds, such as the steps of an attack or of a descent, which then take a few iterations
    instead of dozens. The result is the same, up to the tolerance. A handle belongs to one sequence of calls; potentials of
    another shape are ignored, and far ones cost one pass before the usual start is taken.

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

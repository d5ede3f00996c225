"""The result of one forward pass of a model, and the two results that a recipe compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lightning_wdefense._ranks import Ranks


class Branch(NamedTuple):
    """Outputs and features of a model for one set of inputs, clean or adversarial.

    Attributes:
        outputs: the model's return value.
        features: ``(N, ...)``; ``(N, 0)`` if the recipe compares no features.
        loss: the loss of the user's own step; ``None`` after a plain forward pass.
        values: the values ``(N, ...)`` that the pass was over, if it can be differentiated in them; otherwise ``None``.
    """

    outputs: Any
    features: Tensor
    loss: Tensor | None = None
    values: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether the features are free of NaN and infinite values."""
        return bool(self.features.isfinite().all())


class Compared(NamedTuple):
    """What a recipe compares: the samples of this rank, or the gathered ones of all ranks.

    Attributes:
        clean: outputs and features of the clean inputs; ``None`` if no term needs them.
        adversarial: outputs and features of the adversarial inputs; ``None`` if no term needs them.
        ranks: the ranks that train the model together.
        sizes: number of samples of each rank, if they are gathered; otherwise ``None``.
    """

    clean: Branch | None
    adversarial: Branch | None
    ranks: Ranks
    sizes: list[int] | None = None

    def labels(self, labels: Any) -> Any:
        """The labels of these samples, from those of this rank's."""
        if self.sizes is None or not (isinstance(labels, Tensor) and labels.ndim):
            return labels
        return self.ranks.gather(labels, self.sizes)

"""The transport plan between clean and adversarial features, summed by class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_wdefense.metrics import TransportShift
from lightning_wdefense.transport import sinkhorn

ROWS = 1024
"""Number of rows of the plan that are computed at once."""


def class_plan(clean: Tensor, adversarial: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mass that entropic transport moves from clean samples of a class to adversarial samples of a class.

    The classes of the adversarial samples are their labels. So the plan is diagonal where attacked samples stay nearest to clean samples
    of their own class, and mass beside the diagonal shows which classes the attack makes overlap.

    Args:
        clean: features of clean samples ``(N, D)``.
        adversarial: features of the same samples under attack ``(N, D)``.
        labels: labels of the samples ``(N,)``.
        classes: number of classes.

    Returns:
        The plan ``(classes, classes)`` in float32: rows for the clean, columns for the adversarial samples. Its sum is 1.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> class_plan(features, features + 0.1, torch.tensor([0, 0, 1, 1]), 2).round(decimals=4)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    solution = sinkhorn(clean, adversarial)
    centre = clean.mean(0)
    x, y = clean - centre, adversarial - centre
    temperature = solution.blur.square()
    plan = clean.new_zeros(classes, classes)
    for rows, of_rows in zip(x.split(ROWS), labels.split(ROWS), strict=True):
        costs = torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
        # Rows of the plan sum to the weights of their samples whatever the solver's error.
        shares = ((solution.g - costs) / temperature).softmax(1)
        plan.index_add_(0, of_rows, clean.new_zeros(len(rows), classes).index_add_(1, labels, shares))
    return (plan / len(clean)).float()


class ClassPlan(TransportShift):
    """The transport plan of :func:`class_plan` between the features that :class:`~lightning_wdefense.metrics.TransportShift` keeps.

    ``update`` takes the features, the labels, and the number of classes. ``compute`` returns the plan ``(K, K)``, or ``None`` if there is
    no sample.

    Args:
        max_samples: number of samples that each process keeps.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False

    classes: Tensor

    def __init__(self, max_samples: int = 1024, **kwargs: Any) -> None:
        super().__init__(max_samples, **kwargs)
        self.keeps_labels = True
        self.add_state("classes", torch.tensor(0), dist_reduce_fx="max")

    def update(  # type: ignore[override]
        self, clean_features: Tensor, adversarial_features: Tensor, labels: Tensor, classes: int
    ) -> None:
        """Add a batch of pairs ``(N, D)`` with their labels ``(N,)``."""
        self.classes = self.classes.clamp_min(classes)
        super().update(clean_features, adversarial_features, labels)

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """The plan, on the metric's device."""
        width = int(self.num_features)
        if not width:
            return None
        clean, adversarial = (dim_zero_cat(part).view(-1, width) for part in (self.clean, self.adversarial))
        return class_plan(clean, adversarial, dim_zero_cat(self.labels), int(self.classes))

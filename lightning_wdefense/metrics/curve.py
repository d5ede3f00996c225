"""Robust accuracy as a function of the perturbation budget eps, and the area under this curve (AUAC)."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense.metrics._plot import draw_curve
from lightning_wdefense.metrics._predictions import is_correct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class AccuracyCurve(NamedTuple):
    """Accuracy as a function of eps.

    Attributes:
        epsilons: perturbation budgets ``(E,)``, increasing from 0, in the units in which they were given (data units
            for a ``ThreatModel``).
        accuracies: accuracy at each budget ``(E,)``, as shares in [0, 1] that never increase.
        auac: area under the accuracy curve divided by the largest eps, a scalar in [0, 1].

    Example:
        >>> import torch
        >>> AccuracyCurve(torch.tensor([0.0, 0.1]), torch.tensor([0.9, 0.5]), torch.tensor(0.7)).auac
        tensor(0.7000)
    """

    epsilons: Tensor
    accuracies: Tensor
    auac: Tensor

    def plot(self, ax: "Axes | None" = None, label: str | None = None) -> tuple["Figure", "Axes"]:
        """Plot the curve.

        Args:
            ax: matplotlib axes to draw on; by default those of a new figure.
            label: name of the curve in the legend.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        area = f"AUAC={self.auac.item():.3f}"
        return draw_curve(ax, self.epsilons, self.accuracies, area, label, "eps", "Robust accuracy")


def area_under_accuracy_curve(epsilons: Sequence[float] | Tensor, accuracies: Sequence[float] | Tensor) -> Tensor:
    """Compute the area under an accuracy curve: the trapezoid rule over [0, eps_max], divided by eps_max.

    The area is the mean accuracy for eps drawn uniformly from that interval: 1 for a model that is correct at every budget.

    Args:
        epsilons: perturbation budgets ``(E,)``, strictly increasing from 0.
        accuracies: accuracies at these budgets ``(..., E)``.

    Returns:
        The normalised area ``(...)``, a scalar for one curve.

    Raises:
        ValueError: If ``epsilons`` does not start at 0, does not increase strictly, has fewer than two values, or is not
            as long as the last dimension of ``accuracies``.

    Example:
        >>> from lightning_wdefense.metrics import area_under_accuracy_curve
        >>> area_under_accuracy_curve([0.0, 1.0, 2.0], [0.9, 0.5, 0.1])
        tensor(0.5000)
    """
    values = torch.as_tensor(accuracies)
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    budgets = torch.tensor(_check_epsilons(epsilons), dtype=values.dtype, device=values.device)
    if values.shape[-1:] != budgets.shape:
        raise ValueError(
            f"`accuracies` of shape {tuple(values.shape)} does not match {len(budgets)} epsilons: its last dimension"
            " should have one accuracy for each eps."
        )
    return torch.trapezoid(values, budgets) / budgets[-1]


def robust_accuracy_curve(
    preds: Sequence[Tensor] | Tensor,
    target: Tensor,
    epsilons: Sequence[float] | Tensor,
    ignore_index: int | None = None,
) -> AccuracyCurve:
    """Compute the robust accuracy at each eps, and the area under this curve.

    The eps balls are nested, so an adversarial input for one eps is also allowed at every larger eps. So a sample that is
    wrong at one eps counts as wrong at all larger ones, and the curve never increases.

    Args:
        preds: the outputs on the inputs attacked at each eps, in the order of ``epsilons``: a sequence of E tensors, or
            one tensor stacked in the first dimension. Each holds logits or probabilities ``(N, C, ...)``, class
            indices ``(N, ...)``, or the logits (not probabilities) of a binary classifier, ``(N,)`` or ``(N, 1, ...)``.
        target: integer labels ``(N, ...)``, soft labels ``(N, C, ...)``, or binary labels as floats.
        epsilons: perturbation budgets ``(E,)``, strictly increasing from 0, which means the clean inputs.
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.

    Returns:
        The curve, with accuracies as shares in [0, 1] (NaN if there is no sample).

    Raises:
        TypeError: If predictions or labels are not tensors.
        ValueError: If ``epsilons`` does not start at 0, does not increase strictly or has fewer than two values;
            if ``preds`` is not as long; if shapes do not match, a prediction is NaN, or a label is not a class of the
            logits.

    References:
        Dong et al., "Benchmarking Adversarial Robustness on Image Classification", CVPR 2020 (accuracy curves).

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import robust_accuracy_curve
        >>> preds = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
        >>> robust_accuracy_curve(preds, torch.tensor([0, 1, 1, 0]), epsilons=[0.0, 0.1, 0.2]).accuracies
        tensor([1.0000, 0.7500, 0.5000])
    """
    budgets = _check_epsilons(epsilons)
    correct, total = _count_correct(preds, target, budgets, ignore_index)
    return _to_curve(budgets, correct / total)


class RobustAccuracyCurve(Metric):
    """Robust accuracy as a function of eps, and the area under this curve (AUAC).

    The eps balls are nested, so a sample that is wrong at one eps counts as wrong at all larger ones, and the curve never
    increases. The area is the trapezoid rule over [0, eps_max] divided by eps_max: the mean accuracy over the budgets.

    ``update`` and ``forward`` accept ``preds`` (one tensor for each eps, in order; or one tensor stacked in the first
    dimension) and ``target``, with the shapes given in :func:`robust_accuracy_curve`. ``compute`` returns an
    :class:`AccuracyCurve` of ``epsilons``, ``accuracies`` and ``auac``. Before any update the last two are NaN, with
    the warning that torchmetrics gives.

    Args:
        epsilons: perturbation budgets ``(E,)``, strictly increasing from 0, which means the clean inputs.
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: In ``update``, if predictions or labels are not tensors.
        ValueError: If ``epsilons`` does not start at 0, does not increase strictly or has fewer than two values; in
            ``update``, if ``preds`` is not as long, shapes do not match, a prediction is NaN, or a label is not a class.

    References:
        Dong et al., "Benchmarking Adversarial Robustness on Image Classification", CVPR 2020 (accuracy curves).

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import RobustAccuracyCurve
        >>> metric = RobustAccuracyCurve(epsilons=[0.0, 0.1, 0.2])
        >>> metric.update(torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]]), torch.tensor([0, 1, 1, 0]))
        >>> curve = metric.compute()
        >>> curve.accuracies, curve.auac
        (tensor([1.0000, 0.7500, 0.5000]), tensor(0.7500))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, epsilons: Sequence[float] | Tensor, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.epsilons = _check_epsilons(epsilons)
        self.add_state("correct", torch.zeros(len(self.epsilons), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Tensor] | Tensor, target: Tensor) -> None:
        """Add a batch of predictions, one tensor for each eps; see the class for shapes."""
        correct, total = _count_correct(preds, target, self.epsilons, self.ignore_index)
        self.correct = self.correct + correct
        self.total = self.total + total

    def compute(self) -> AccuracyCurve:
        """Return the curve and the area under it."""
        return _to_curve(self.epsilons, self.correct / self.total)

    def plot(
        self, val: AccuracyCurve | None = None, ax: "Axes | None" = None, label: str | None = None
    ) -> tuple["Figure", "Axes"]:
        """Plot a curve (by default what ``compute`` returns) on ``ax``; pass the same ``ax`` again to compare models.

        Args:
            val: a result of ``compute`` or ``forward``.
            ax: matplotlib axes to draw on. By default those of a new figure.
            label: name of the curve in the legend, before its area.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return (self.compute() if val is None else val).plot(ax, label)


def _count_correct(
    preds: Sequence[Tensor] | Tensor, target: Tensor, epsilons: Sequence[float], ignore_index: int | None
) -> tuple[Tensor, int]:
    """Count the elements that are correct at each eps and all smaller ones, and all elements."""
    if len(preds) != len(epsilons):
        raise ValueError(
            f"`preds` holds predictions for {len(preds)} budgets, but there are {len(epsilons)} epsilons, {epsilons}."
            " Pass one tensor for each eps, in the same order; the first is for the clean inputs."
        )
    right = [is_correct(pred, target, f"preds[{i}]", ignore_index) for i, pred in enumerate(preds)]
    left = torch.stack(list(accumulate(right, torch.logical_and)))
    return left.flatten(1).sum(1), right[0].numel()


def _to_curve(epsilons: Sequence[float], accuracies: Tensor) -> AccuracyCurve:
    budgets = torch.tensor(epsilons, dtype=accuracies.dtype, device=accuracies.device)
    return AccuracyCurve(budgets, accuracies, area_under_accuracy_curve(epsilons, accuracies))


def _check_epsilons(epsilons: Sequence[float] | Tensor) -> tuple[float, ...]:
    budgets = tuple(float(eps) for eps in epsilons)
    if len(budgets) < 2:
        raise ValueError(
            f"`epsilons` should hold 0.0 (the clean inputs) and at least one larger budget, got {budgets}."
        )
    if not all(low < high < math.inf for low, high in pairwise(budgets)):
        raise ValueError(
            f"`epsilons` should be finite and increase strictly, got {budgets}. Sort it and drop duplicates."
        )
    if budgets[0] != 0:
        raise ValueError(
            f"`epsilons` should start at 0.0, which means the clean inputs, got {budgets}. Put 0.0 first, and the clean"
            " predictions first in `preds`."
        )
    return budgets

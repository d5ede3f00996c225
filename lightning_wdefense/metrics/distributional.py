"""Distributional accuracy: the accuracy that is left by an adversary with one Wasserstein budget for all samples."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense.metrics._order import check_order
from lightning_wdefense.metrics._plot import draw_curve
from lightning_wdefense.metrics._states import concatenated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class DistributionalCurve(NamedTuple):
    """Distributional accuracy as a function of the radius.

    Attributes:
        radii: radii of the Wasserstein ball ``(R,)``, increasing, in the units of the distances.
        accuracies: accuracy that the best adversary leaves at each radius ``(R,)``, as shares in [0, 1] that never increase.
        area: area under the curve from 0 to the largest radius, divided by that radius (trapezoid rule over 0 and the radii), a scalar
            in [0, 1].
        p: order of the Wasserstein distance, from 1 to ``inf``.

    Example:
        >>> import torch
        >>> DistributionalCurve(torch.tensor([0.5]), torch.tensor([0.8]), torch.tensor(0.9), p=2.0).area
        tensor(0.9000)
    """

    radii: Tensor
    accuracies: Tensor
    area: Tensor
    p: float

    def plot(self, ax: "Axes | None" = None, label: str | None = None) -> tuple["Figure", "Axes"]:
        """Plot the curve.

        Args:
            ax: matplotlib axes to draw on; by default those of a new figure.
            label: name of the curve in the legend.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        area = f"area={self.area.item():.3f}"
        axis = f"radius of the Wasserstein ball (W_{self.p:g})"
        return draw_curve(ax, self.radii, self.accuracies, area, label, axis, "Distributional accuracy")


def distributional_accuracy(
    distances: Tensor, radii: Sequence[float] | Tensor, p: float = 2.0, weights: Tensor | None = None
) -> DistributionalCurve:
    r"""Compute the accuracy that is left by the best adversary within a Wasserstein ball around the samples.

    The adversary may replace the distribution P of the samples by any Q with ``W_p(P, Q) <= radius``; labels stay. It shares one
    budget over all samples, where an ordinary attack has the same budget for each. A sample at distance ``d`` from the nearest
    misclassified input costs ``w d^p`` of the budget ``radius^p`` (``w`` is its share of the mass), and its mass can be split. So the
    best adversary takes the cheapest samples first until the budget is spent. This is the exact optimum (a fractional knapsack).
    For ``p=inf`` each sample has the whole budget, and the result is the ordinary robust accuracy at each radius.

    The result is as good as the distances. Distances that an attack found are upper bounds of the true ones, so the curve is an upper
    bound of the true accuracy. Certified radii (0 where the certified class is wrong or the classifier abstains) are lower bounds. With
    them the result is a lower bound of the accuracy under every such adversary, for the norm of the certificate, with the confidence of
    the certificates.

    Args:
        distances: distance of each sample to the nearest misclassified input, ``(N,)`` floats: 0 if it is misclassified already,
            ``inf`` if nothing was found. The norm and unit of these distances are those of the Wasserstein ball.
        radii: radii of the Wasserstein ball ``(R,)``, not negative and strictly increasing.
        p: order of the Wasserstein distance, from 1 to ``inf``.
        weights: weight of each sample ``(N,)``, not negative; they need not sum to 1. ``None`` for equal weights.

    Returns:
        The curve on the device of the distances, in float64 for float64 distances, else in float32. The accuracies are NaN if there is
        no sample. Sums are taken in float64.

    Raises:
        TypeError: If distances or weights are not float tensors.
        ValueError: If ``p`` is below 1 or NaN; if the radii are empty, negative, not finite, do not increase or end at 0; if distances
            or weights are negative or NaN, their shapes differ, all weights are 0, or all distances are infinite.

    References:
        Staib and Jegelka, "Distributionally robust deep learning as a generalization of adversarial training", 2017. Sinha, Namkoong,
        Duchi, "Certifying some distributional robustness with principled adversarial training", 2018. Bai, He, Jiang, Obloj,
        "Wasserstein distributional robustness of neural networks", NeurIPS 2023.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import distributional_accuracy
        >>> distances = torch.tensor([0.0, 1.0, 2.0, 3.0])  # one of four is misclassified
        >>> distributional_accuracy(distances, [0.5, 1.0], p=2).accuracies  # a quarter of the mass moves by 1: 0.25 = 0.5 ** 2
        tensor([0.5000, 0.3125])
        >>> distributional_accuracy(distances, [0.5, 1.0], p=torch.inf).accuracies
        tensor([0.7500, 0.5000])
    """
    radii, p = _check_radii(radii), check_order(p)
    distances, weights = _read(distances, weights)
    return _curve(distances, weights, radii, p)


class DistributionalAccuracy(Metric):
    """Accuracy that is left by the best adversary within a Wasserstein ball around the samples.

    ``update`` and ``forward`` accept ``distances`` ``(N,)``, the distance of each sample to the nearest misclassified input (0 if it is
    misclassified already, ``inf`` if nothing was found), and optionally ``weights`` ``(N,)``, 1 by default. ``compute`` returns a
    :class:`DistributionalCurve` of ``radii``, ``accuracies``, ``area`` and ``p``, see :func:`distributional_accuracy` for what it
    means. For a single radius torchmetrics makes scalars of ``radii`` and ``accuracies``. Before any update the accuracies are NaN, with
    the warning that torchmetrics gives. All distances are kept, in float32.

    Args:
        radii: radii of the Wasserstein ball ``(R,)``, not negative and strictly increasing, in the units of the distances.
        p: order of the Wasserstein distance, from 1 to ``inf``.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: In ``update``, if distances or weights are not float tensors.
        ValueError: If ``p`` or the radii are out of range; in ``update``, if distances or weights are negative or NaN, or their shapes
            differ; in ``compute``, if all weights are 0 or all distances are infinite.

    References:
        Staib and Jegelka, "Distributionally robust deep learning as a generalization of adversarial training", 2017.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import DistributionalAccuracy
        >>> metric = DistributionalAccuracy(radii=[0.5, 1.0])
        >>> metric.update(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        >>> metric.compute().accuracies
        tensor([0.5000, 0.3125])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    distances: list[Tensor]
    weights: list[Tensor]

    def __init__(self, radii: Sequence[float] | Tensor, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.radii, self.p = _check_radii(radii), check_order(p)
        for state in ("distances", "weights"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, distances: Tensor, weights: Tensor | None = None) -> None:
        """Add the distances of a batch; see the class for shapes."""
        distances, weights = _read(distances, weights)
        self.distances.append(distances.to(torch.float32, copy=True))
        self.weights.append(weights.to(torch.float32, copy=True))

    def compute(self) -> DistributionalCurve:
        """Return the curve over all samples."""
        distances, weights = (concatenated(parts, self.device) for parts in (self.distances, self.weights))
        return _curve(distances, weights, self.radii, self.p)

    def plot(
        self, val: DistributionalCurve | None = None, ax: "Axes | None" = None, label: str | None = None
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


def _curve(distances: Tensor, weights: Tensor, radii: tuple[float, ...], p: float) -> DistributionalCurve:
    dtype = torch.float64 if distances.dtype == torch.float64 else torch.float32
    # In the precision of the distances: with p = inf, one of exactly 0.1 falls at 0.1.
    places = torch.tensor((0.0, *radii), dtype=dtype).double()
    # On the CPU: not every device has float64.
    left = _accuracies(distances.cpu().double(), weights.cpu().double(), places.tolist(), p)
    area = torch.trapezoid(left, places) / places[-1]
    places, left, area = (value.to(distances.device, dtype) for value in (places[1:], left[1:], area))
    return DistributionalCurve(places, left, area, p)


def _accuracies(distances: Tensor, weights: Tensor, radii: Sequence[float], p: float) -> Tensor:
    """The accuracy left at each radius."""
    if not len(distances):
        return torch.full((len(radii),), torch.nan, dtype=distances.dtype)
    distances, weights = distances[weights > 0], weights[weights > 0]
    if not len(weights):
        raise ValueError(
            "All weights are 0, so there is no distribution: give a positive weight to at least one sample."
        )
    _check_something_was_found(distances)
    distances, order = distances.sort()
    weights = weights[order] / weights.sum()
    return torch.stack([1 - _fooled(distances, weights, radius, p) for radius in radii]).clamp(0, 1)


def _fooled(distances: Tensor, weights: Tensor, radius: float, p: float) -> Tensor:
    """The largest share of the mass that one budget fools; distances ascend and weights sum to 1."""
    if radius == 0 or math.isinf(p):
        return weights[distances <= radius].sum()
    # In units of the budget, so that a large p neither overflows nor underflows where it matters: a cost that rounds to 0 is free, and
    # one that rounds to infinity cannot be paid.
    costs = (distances / radius).pow(p)
    spent = (weights * costs).cumsum(0)
    whole = int((spent <= 1).sum())
    fooled = weights[:whole].sum()
    if whole < len(weights):  # the next sample is split: the rest of the budget moves a part of its mass
        rest = 1 - (spent[whole - 1] if whole else spent.new_zeros(()))
        fooled = fooled + torch.minimum(rest / costs[whole], weights[whole])
    return fooled


def _check_something_was_found(distances: Tensor) -> None:
    """Distances of samples whose weight is positive."""
    infinite = distances.isinf()
    cause = "the gradient may be masked or zero, the attack may have too few steps, or its search may stop below these distances"
    if infinite.all():
        raise ValueError(
            f"All {len(distances)} distances are infinite: the attack found no misclassified input at all, which says more about the "
            f"attack than about the model ({cause}). Check the attack on one batch, or take a black-box attack."
        )
    if infinite.any() and not (distances[~infinite] > 0).any():
        warnings.warn(
            f"The attack fooled none of the {int(infinite.sum())} samples that were classified correctly, so the curve is flat: {cause}.",
            stacklevel=5,
        )


def _read(distances: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Detached, the weights by default 1."""
    if weights is None:
        weights = torch.ones_like(distances) if isinstance(distances, Tensor) else distances
    for name, value in (("distances", distances), ("weights", weights)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` should be a float tensor (N,), one value for each sample, got {kind}.")
    if distances.ndim != 1 or distances.shape != weights.shape:
        raise ValueError(
            f"`distances` should hold one value for each sample, (N,), and `weights` as many, got shapes {tuple(distances.shape)} and "
            f"{tuple(weights.shape)}."
        )
    distances, weights = distances.detach(), weights.detach()
    if not bool((distances >= 0).all()):
        bad = distances[~(distances >= 0)]
        raise ValueError(
            f"`distances` should be 0 or more, or inf where the attack found nothing, got {bad[0].item()} ({len(bad)} of "
            f"{len(distances)} are negative or NaN). Use 0 for samples that are misclassified already."
        )
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        bad = weights[~((weights >= 0) & weights.isfinite())]
        raise ValueError(
            f"`weights` should be finite and 0 or more, got {bad[0].item()} ({len(bad)} of {len(weights)})."
        )
    return distances, weights


def _check_radii(radii: Sequence[float] | Tensor) -> tuple[float, ...]:
    values = tuple(float(radius) for radius in radii)
    if not values or not all(0 <= radius < math.inf for radius in values):
        raise ValueError(f"`radii` should hold at least one radius, each finite and not negative, got {values}.")
    if not all(low < high for low, high in pairwise(values)) or values[-1] == 0:
        raise ValueError(
            f"`radii` should increase strictly and end above 0, got {values}. Sort it and drop duplicates."
        )
    return values

"""Sensitivity: the first-order growth of the worst expected loss in a Wasserstein ball, from input gradients."""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.norms import BALLS
from lightning_wdefense.metrics._order import check_order
from lightning_wdefense.metrics._plot import plot_values
from lightning_wdefense.metrics._states import concatenated
from lightning_wdefense.modules.outputs import float32_or_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GroundNorm = Literal["l1", "l2", "linf"]


def sensitivity(gradients: Tensor, p: float = 2.0, norm: GroundNorm = "l2") -> Tensor:
    """Compute the first-order growth of the worst expected loss in a Wasserstein ball.

    For a small radius, the largest expected loss over all distributions within ``W_p`` distance ``radius`` of the data is ``mean loss +
    radius * sensitivity``, up to terms of higher order. The sensitivity is ``(mean_i |g_i|_*^q)^(1/q)`` with ``1/p + 1/q = 1``,
    where ``g_i`` is the gradient of sample i's loss with respect to its input, and ``|.|_*`` is the dual norm. So one backward
    pass gives it. It says nothing about large radii, and a model with masked gradients has a low one without being robust.

    Args:
        gradients: gradients ``(N, ...)`` of each sample's own loss (not of the batch mean) with respect to the inputs in data units. If
            they are taken in model units, divide them by the std of the normalisation.
        p: order of the Wasserstein distance, from 1 to ``inf``.
        norm: norm of the perturbations, ``"l1"``, ``"l2"`` or ``"linf"``. The gradients are measured in the dual norm.

    Returns:
        A scalar, in units of the loss per data unit; NaN if there is no sample.

    Raises:
        TypeError: If the gradients are not a float tensor.
        ValueError: If ``p`` is below 1 or NaN, the norm is unknown, or the gradients have no values per sample or are not finite.

    References:
        Bartl, Drapeau, Obloj, Wiesel, "Sensitivity analysis of Wasserstein distributionally robust optimization problems", 2021. Bai,
        He, Jiang, Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import sensitivity
        >>> inputs, labels, model = torch.rand(8, 4, requires_grad=True), torch.arange(8) % 3, torch.nn.Linear(4, 3)
        >>> loss = torch.nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
        >>> (gradients,) = torch.autograd.grad(loss, inputs)
        >>> bool(sensitivity(gradients, p=2) >= sensitivity(gradients, p=torch.inf))
        True
    """
    p = _check(p, norm)
    return _power_mean(_dual_norms(gradients, norm), p)


class Sensitivity(Metric):
    """First-order growth of the worst expected loss in a Wasserstein ball.

    ``update`` and ``forward`` accept ``gradients`` ``(N, ...)``, the gradients of each sample's own loss with respect to its input, in
    data units. ``compute`` returns a scalar in units of the loss per data unit, see :func:`sensitivity`, or NaN if there is no
    sample (before any update with the warning that torchmetrics gives). One number per sample is kept: the dual norm of its gradient.

    Args:
        p: order of the Wasserstein distance, from 1 to ``inf``.
        norm: norm of the perturbations, ``"l1"``, ``"l2"`` or ``"linf"``.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: In ``update``, if the gradients are not a float tensor.
        ValueError: If ``p`` is below 1 or NaN, or the norm is unknown; in ``update``, if the gradients have no values per sample or are
            not finite.

    References:
        Bai, He, Jiang, Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import Sensitivity
        >>> metric = Sensitivity(p=2, norm="l2")
        >>> metric.update(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))  # norms 5 and 1: the root of (25 + 1) / 2
        >>> metric.compute()
        tensor(3.6056)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    # Norms and not their powers: for p near 1 the exponent q is huge, and sums of powers would overflow or vanish.
    norms: list[Tensor]

    def __init__(self, p: float = 2.0, norm: GroundNorm = "l2", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.p, self.norm = _check(p, norm), norm
        self.add_state("norms", [], dist_reduce_fx="cat")

    def update(self, gradients: Tensor) -> None:
        """Add the gradients of a batch; see the class for shapes."""
        self.norms.append(_dual_norms(gradients, self.norm).float())

    def compute(self) -> Tensor:
        """Return the sensitivity over all samples, a scalar."""
        return _power_mean(concatenated(self.norms, self.device), self.p)

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Plot ``val``, a result or a list of results over steps (by default what ``compute`` returns), on ``ax``."""
        return plot_values(self, val, ax)


def _power_mean(norms: Tensor, p: float) -> Tensor:
    """``(mean norms^q)^(1/q)``, scaled by the largest so that no power overflows."""
    if not len(norms):
        return norms.new_full((), torch.nan)
    largest = norms.max()
    if p == 1 or largest == 0:
        return largest
    q = 1.0 if math.isinf(p) else p / (p - 1)
    # On the CPU: not every device has float64.
    ratios = norms.cpu().double() / largest.item()
    return (largest.item() * ratios.pow(q).mean().pow(1 / q)).to(norms.device, norms.dtype)


def _dual_norms(gradients: Tensor, norm: str) -> Tensor:
    if not isinstance(gradients, Tensor) or not gradients.is_floating_point():
        kind = gradients.dtype if isinstance(gradients, Tensor) else type(gradients).__name__
        raise TypeError(f"`gradients` should be a float tensor (N, ...) of input gradients, got {kind}.")
    if gradients.ndim == 0 or not gradients.shape[1:].numel():
        raise ValueError(
            f"`gradients` should be (N, ...), one gradient for each sample, without empty dimensions after N, got shape {tuple(gradients.shape)}."
        )
    if not bool(gradients.isfinite().all()):
        raise ValueError(
            "`gradients` holds NaN or infinite values: check whether the loss is finite, or scale it in half precision."
        )
    return BALLS[norm].dual(float32_or_better(gradients.detach()))


def _check(p: float, norm: str) -> float:
    p = check_order(p)
    if norm not in get_args(GroundNorm):
        raise ValueError(unknown_name("norm", norm, get_args(GroundNorm)))
    return p

"""Transport shift: the Sinkhorn divergence between a model's clean and adversarial features."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_wdefense.metrics._plot import plot_values
from lightning_wdefense.transport import SinkhornDivergence
from lightning_wdefense.transport.entropic.options import Cost, Solver

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TransportShift(Metric):
    """Sinkhorn divergence between the features of clean inputs and the features of their adversarial inputs.

    The value is 0 if the attack does not change the distribution of the features. It grows with the transport cost
    |x - y|^p / p between the two distributions (with ``p=2``, half the squared distance). Its unit is the unit of the
    features to the power ``p``, so compare models only if their features have the same scale.

    ``update`` and ``forward`` accept ``clean_features`` and ``adversarial_features``, two float tensors of the same
    shape ``(N, ...)``, which are flattened to ``(N, D)``, and with ``label_cost`` also ``labels``, integers ``(N,)``.
    ``compute`` returns a scalar; without any pair it is NaN (before any update with the warning that torchmetrics
    gives).

    The metric keeps the features of the first ``max_samples`` pairs that *each process* sees, in its own dtype (see
    :meth:`torchmetrics.Metric.set_dtype`). So shuffle the data if it is sorted (such as by class), and compare only
    values with the same number of samples.

    Args:
        max_samples: number of pairs that each process keeps.
        p: 1 for the distance as cost, 2 for half the squared distance.
        blur: blur of the transport, in units of the features; overrides ``relative_blur``.
        relative_blur: blur in units of the typical distance between clean and adversarial features.
        reach: distance, in units of the features, beyond which mass is destroyed and created instead of moved; ``None``
            for balanced transport.
        cost: ``(x, y) -> cost matrix`` instead of ``|x - y|^p / p``.
        label_cost: cost added between samples with different labels. Without it, labels are not used, but may be passed.
        tol: marginal error of the transport plan, as a share of the mass, at which the solver stops.
        max_iter: largest number of iterations at the final temperature.
        solver: ``"native"``, or ``"geomloss"`` for a second opinion.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``max_samples`` is below 1 or a setting of the transport is out of range; in ``update``, if shapes
            do not match each other or those of earlier updates, a feature is not finite, or ``label_cost`` is set and
            there are no labels.
        TypeError: In ``update``, if the features are not float tensors, or the labels not integers.

    References:
        Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import TransportShift
        >>> metric = TransportShift(max_samples=64)
        >>> features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> metric.update(features, features + 1.0)  # each of 8 features moves by 1: 8 / 2 = 4
        >>> print(f"{metric.compute():.2f}")
        4.00
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = True  # what an update keeps depends on how much is held already
    plot_lower_bound = 0.0

    num_features: Tensor
    clean: list[Tensor]
    adversarial: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        max_samples: int = 1024,
        *,
        p: int = 2,
        blur: float | None = None,
        relative_blur: float = 0.2,
        reach: float | None = None,
        cost: Cost | None = None,
        label_cost: float | None = None,
        tol: float = 5e-4,
        max_iter: int = 1000,
        solver: Solver = "native",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_samples < 1:
            raise ValueError(f"`max_samples` should be at least 1, got {max_samples}.")
        self.max_samples = max_samples
        self.label_cost = label_cost
        self.keeps_labels = label_cost is not None
        self.divergence = SinkhornDivergence(p, blur, relative_blur, reach, cost, label_cost, tol, max_iter, solver)
        self.add_state("num_features", torch.tensor(0), dist_reduce_fx="max")
        # Flat, because a process without data takes part in gathering them with an empty vector.
        for state in ("clean", "adversarial", "labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, clean_features: Tensor, adversarial_features: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch of pairs, up to ``max_samples`` in total; see the class for shapes."""
        _check_features(clean_features, adversarial_features)
        self._check_labels(labels, len(clean_features))
        if not len(clean_features):
            return
        width, known = clean_features.shape[1:].numel(), int(self.num_features)
        if known not in (0, width):
            raise ValueError(
                f"The features have {width} values per sample, those of earlier updates had {known}. Take them from"
                " one layer at one input size, pool them, or use one metric for each size."
            )
        held = sum(part.numel() for part in self.clean) // width
        room = self.max_samples - held
        if room <= 0:
            return
        self.num_features = torch.full_like(self.num_features, width)
        # Copies, because a view would keep the whole batch in memory, and a model may reuse its buffers.
        self.clean.append(clean_features[:room].flatten().to(self.dtype, copy=True))
        self.adversarial.append(adversarial_features[:room].flatten().to(self.dtype, copy=True))
        if labels is not None and self.keeps_labels:
            self.labels.append(labels[:room].to(torch.long, copy=True))

    def compute(self) -> Tensor:
        """Return the divergence, a scalar, or NaN if there is no pair."""
        width = int(self.num_features)
        if not width:
            return torch.full((), torch.nan, device=self.device)
        clean = dim_zero_cat(self.clean).view(-1, width)
        adversarial = dim_zero_cat(self.adversarial).view(-1, width)
        labels = None if self.label_cost is None else dim_zero_cat(self.labels)
        return self.divergence(clean, adversarial, x_labels=labels, y_labels=labels)

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Plot ``val``, a result or a list of results over steps (by default what ``compute`` returns), on ``ax``."""
        return plot_values(self, val, ax)

    def _check_labels(self, labels: Tensor | None, num_samples: int) -> None:
        if self.label_cost is None:
            return
        if labels is None:
            raise ValueError(
                f"`label_cost={self.label_cost}` needs labels: pass `labels` to each update, or `label_cost=None`."
            )
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"`labels` should be a tensor of integers, got {kind}. Take the argmax of soft labels.")
        if labels.shape != (num_samples,):
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} does not match {num_samples} pairs of features: pass one"
                f" label for each, of shape ({num_samples},)."
            )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For the empty list of a process without data torchmetrics would gather floats, but other processes gather integers.
        self.labels = self.labels or [torch.empty(0, dtype=torch.long, device=self.device)]
        super()._sync_dist(*args, **kwargs)


def _check_features(clean: Tensor, adversarial: Tensor) -> None:
    for name, value in (("clean_features", clean), ("adversarial_features", adversarial)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`{name}` should be a float tensor (N, ...) of features, got {kind}.")
        if not torch.isfinite(value).all():
            raise ValueError(f"`{name}` holds NaN or infinite values: check whether the model or the attack diverged.")
    if clean.shape != adversarial.shape or clean.ndim == 0 or not clean.shape[1:].numel():
        raise ValueError(
            f"`clean_features` and `adversarial_features` should have the same shape (N, ...), without empty dimensions"
            f" after N, got {tuple(clean.shape)} and {tuple(adversarial.shape)}. Pass the features of the same samples."
        )

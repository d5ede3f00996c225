"""Detectability: the area under a detector's ROC curve between clean and attacked samples, with a bootstrap interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from lightning_wdefense.metrics._plot import get_axes
from lightning_wdefense.metrics._states import concatenated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHUNK = 2**24
"""Number of elements of the bootstrap's largest temporary tensor."""


class AUROC(NamedTuple):
    """An area under the ROC curve (AUROC) and its bootstrap interval, scalars in [0, 1].

    Attributes:
        value: the share of pairs (clean sample, adversarial sample) in which the adversarial sample has the higher score; ties
            count one half. A perfect detector has 1, chance is 0.5.
        low: lower end of the bootstrap interval.
        high: upper end of the bootstrap interval.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import detectability
        >>> detectability(torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.9])).value
        tensor(1.)
    """

    value: Tensor
    low: Tensor
    high: Tensor


def detectability(
    clean_scores: Tensor, adversarial_scores: Tensor, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> AUROC:
    """Compute the area under a detector's ROC curve, with a bootstrap interval.

    The percentile interval resamples clean and adversarial scores independently. If both come from the same images, the interval is
    wider than necessary. If the scores do not overlap, the interval has width 0. This does not show that they never overlap: do not
    rely on it with only a few dozen samples.

    Args:
        clean_scores: the detector's scores of clean samples ``(N,)``; higher means more likely adversarial.
        adversarial_scores: the detector's scores of attacked samples ``(M,)``.
        resamples: number of bootstrap resamples.
        confidence: confidence level of the interval, between 0 and 1.
        seed: seed of the resamples. The same scores give the same interval, on all devices.

    Returns:
        The area and the ends of the interval, scalars in [0, 1], on the device of the scores; NaN if one of the two has no scores.

    Raises:
        TypeError: If scores are not float tensors.
        ValueError: If scores are not ``(N,)`` or hold NaN, ``resamples`` is below 1, or ``confidence`` is not between 0 and 1.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993. Hanley and McNeil, "The meaning and use of the area
        under a receiver operating characteristic (ROC) curve", 1982.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import detectability
        >>> clean, adversarial = torch.arange(100) / 100, torch.arange(100) / 100 + 0.5
        >>> value, low, high = detectability(clean, adversarial)
        >>> print(f"{value:.3f}, between {low:.2f} and {high:.2f}")
        0.875, between 0.83 and 0.92
    """
    _check_settings(resamples, confidence)
    clean, adversarial = _read(clean_scores, "clean_scores"), _read(adversarial_scores, "adversarial_scores")
    if not len(clean) or not len(adversarial):
        nan = torch.full((), torch.nan, device=clean.device)
        return AUROC(nan, nan, nan)
    levels, ranks = torch.cat([clean, adversarial]).cpu().unique(return_inverse=True)
    target = (torch.arange(len(ranks)) >= len(clean)).long()
    # Ranks, because torchmetrics would apply a sigmoid to scores outside of [0, 1], which makes large scores equal.
    value = binary_auroc(ranks.double() / len(ranks), target)
    draws = _resampled(ranks, len(clean), len(levels), resamples, seed)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=draws.dtype)
    value, low, high = (end.float().to(clean.device) for end in (value, *torch.quantile(draws, tails)))
    return AUROC(value, low, high)


class Detectability(Metric):
    """Area under a detector's ROC curve between clean and attacked samples, with a bootstrap interval.

    ``update`` and ``forward`` accept ``clean_scores`` ``(N,)`` and ``adversarial_scores`` ``(M,)``, float tensors where higher
    means more likely adversarial; either may be empty. ``compute`` returns an :class:`AUROC` of three scalars in [0, 1]: the value
    and the ends of its interval, see :func:`detectability`. They are NaN if there are no clean or no adversarial scores (before any
    update with the warning that torchmetrics gives). All scores are kept, in float32. Higher is better for the defender.

    Args:
        resamples: number of bootstrap resamples.
        confidence: confidence level of the interval, between 0 and 1.
        seed: seed of the resamples.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: In ``update``, if scores are not float tensors.
        ValueError: If a setting is out of its range; in ``update``, if scores are not ``(N,)`` or hold NaN.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import Detectability
        >>> metric = Detectability()
        >>> metric.update(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.4, 0.5]))
        >>> metric.compute().value
        tensor(0.8889)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    clean: list[Tensor]
    adversarial: list[Tensor]

    def __init__(self, resamples: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_settings(resamples, confidence)
        self.resamples, self.confidence, self.seed = resamples, confidence, seed
        for state in ("clean", "adversarial"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, clean_scores: Tensor, adversarial_scores: Tensor) -> None:
        """Add scores; see the class for shapes."""
        clean, adversarial = _read(clean_scores, "clean_scores"), _read(adversarial_scores, "adversarial_scores")
        self.clean.append(clean)
        self.adversarial.append(adversarial)

    def compute(self) -> AUROC:
        """Return the area and its interval."""
        sides = [concatenated(side, self.device) for side in (self.clean, self.adversarial)]
        return detectability(*sides, resamples=self.resamples, confidence=self.confidence, seed=self.seed)

    def plot(self, val: AUROC | Sequence[AUROC] | None = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Plot ``val``, a result or a list of results over steps (by default what ``compute`` returns), on ``ax``; 0.5 is dashed."""
        figure, ax = get_axes(ax)
        val = self.compute() if val is None else val
        results = [val] if isinstance(val, AUROC) else list(val)
        values, lows, highs = ([float(end) for end in ends] for ends in zip(*results, strict=True))
        steps = range(len(results))
        (line,) = ax.plot(steps, values, marker="o", label=f"AUROC={values[-1]:.3f}")
        ax.vlines(steps, lows, highs, color=line.get_color(), alpha=0.6)
        ax.axhline(0.5, color="gray", linestyle="--", linewidth=1)
        ax.set(ylim=(-0.02, 1.02), xticks=list(steps), xlabel="step", ylabel="AUROC")
        ax.legend()
        return figure, ax


def _resampled(ranks: Tensor, num_clean: int, num_levels: int, resamples: int, seed: int) -> Tensor:
    """The area under the ROC curve of each resample, ``(resamples,)``."""
    # Sorted, so that the order of batches and processes does not matter.
    clean, adversarial = ranks[:num_clean].sort().values, ranks[num_clean:].sort().values
    generator = torch.Generator().manual_seed(seed)
    values = []
    for part in torch.arange(resamples).split(max(1, CHUNK // (len(ranks) + num_levels))):
        drawn = [
            side[torch.randint(len(side), (len(part), len(side)), generator=generator)] for side in (clean, adversarial)
        ]
        ones = torch.ones((), dtype=torch.float32).expand(drawn[0].shape)
        counts = torch.zeros(len(part), num_levels, dtype=torch.float32).scatter_add_(1, drawn[0], ones)
        below = counts.double().cumsum(1) - 0.5 * counts
        values.append(below.gather(1, drawn[1]).mean(1) / len(clean))
    return torch.cat(values)


def _read(scores: Tensor, name: str) -> Tensor:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"`{name}` should be a float tensor (N,) of a detector's scores, got {kind}.")
    if scores.ndim != 1:
        raise ValueError(f"`{name}` should hold one score for each sample, (N,), got shape {tuple(scores.shape)}.")
    if torch.isnan(scores).any():
        raise ValueError(f"`{name}` holds NaN, which cannot be ranked. Check whether the features are finite.")
    return scores.detach().to(torch.float32, copy=True)


def _check_settings(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"`resamples` should be at least 1, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` should be between 0 and 1, such as 0.95, got {confidence}.")

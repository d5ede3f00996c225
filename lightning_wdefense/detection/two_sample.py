"""Two-sample permutation tests of whether a batch comes from the clean distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.modules.outputs import float32_or_better
from lightning_wdefense.transport import sinkhorn_divergence
from lightning_wdefense.transport.clouds.measures import read_measures
from lightning_wdefense.transport.kernels.energy import energy_distances, euclidean_distances
from lightning_wdefense.transport.kernels.gaussian import multiscale_kernel

StatisticName = Literal["sinkhorn", "mmd", "energy"]

RELATIVE_BLUR = 0.2
"""Blur of the Sinkhorn statistic, in units of the square root of the mean cost of the pooled sample."""


class TwoSampleResult(NamedTuple):
    """The outcome of :func:`two_sample_test`.

    Attributes:
        statistic: the statistic of the two samples, a scalar; its unit depends on the statistic.
        p_value: the share of permutations, the identity included, with at least this value of the statistic. It is small if the
            samples have different distributions.

    Example:
        >>> import torch
        >>> x, y = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
        >>> statistic, p_value = two_sample_test(x, y)
        >>> bool(statistic >= 0), 0 < p_value <= 1
        (True, True)
    """

    statistic: Tensor
    p_value: float


def two_sample_test(
    x: Tensor, y: Tensor, statistic: StatisticName = "energy", *, permutations: int = 200, seed: int = 0
) -> TwoSampleResult:
    """Permutation test of the null hypothesis that two independent samples have the same distribution.

    The p-value is ``(1 + #{permutations with a statistic at least as large}) / (1 + permutations)``. Under the null hypothesis it is
    at most ``alpha`` with a probability of at most ``alpha``, for every distribution and sample size. The samples must be
    independent for this: do not compare a batch with its own attacked copy.

    Args:
        x: first sample ``(N, ...)``, such as features of clean samples.
        y: second sample ``(M, ...)``, such as features of a batch that may be attacked.
        statistic: ``"sinkhorn"`` for the Sinkhorn divergence (cost ``|x - y|^2 / 2``); ``"mmd"`` for the squared maximum mean
            discrepancy with five Gaussian kernels around the mean squared distance; ``"energy"`` for the energy distance
            ``2 E|x - y| - E|x - x'| - E|y - y'|``.
        permutations: number of random permutations; the p-value is at least ``1 / (1 + permutations)``. With ``"sinkhorn"`` each
            permutation costs one transport problem; with the others its cost is small.
        seed: seed of the permutations.

    Returns:
        The statistic, a scalar in float32 or better, and the p-value.

    Raises:
        TypeError: if a sample is not a float tensor.
        ValueError: if shapes do not fit, a value is not finite, the statistic is unknown, a sample has fewer than 2 points, or
            ``permutations`` is below 1.

    References:
        Phipson and Smyth, "Permutation p-values should never be zero", 2010. Székely and Rizzo, "Energy statistics", 2013.
        Gretton et al., "A kernel two-sample test", JMLR 2012. Grosse et al., "On the (statistical) detection of adversarial
        examples", 2017.

    Example:
        >>> import torch
        >>> x, y = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
        >>> two_sample_test(x, y).p_value > 0.05, two_sample_test(x, y + 1).p_value < 0.01
        (True, True)
    """
    if statistic not in get_args(StatisticName):
        raise ValueError(unknown_name("two-sample statistic", statistic, get_args(StatisticName)))
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}.")
    x, y = (each.flatten(1) if isinstance(each, Tensor) and each.ndim > 2 else each for each in (x, y))
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        read_measures(x, y, None, None, None, None, balanced=True)
        for name, sample in (("x", x), ("y", y)):
            if sample.ndim != 2 or len(sample) < 2:
                raise ValueError(
                    f"{name} must be a sample (N, ...) of at least 2 points, got shape {tuple(sample.shape)}."
                )
        points = float32_or_better(torch.cat([x, y]))
        points = points - points.mean(0)
        generator = torch.Generator().manual_seed(seed)
        orders = [
            torch.arange(len(points)),
            *(torch.randperm(len(points), generator=generator) for _ in range(permutations)),
        ]
        values = _STATISTICS[statistic](points)(torch.stack(orders).to(device), len(x))
        # Permutations that divide the points in the same way may have values that differ by rounding.
        tolerance = 1e-5 * values.abs().amax()
        return TwoSampleResult(values[0], float((values >= values[0] - tolerance).sum()) / len(values))


class TwoSampleTest:
    """:func:`two_sample_test` with the interface of a detector: ``fit(features)`` on clean samples, then ``test(features)`` on a batch.

    Args:
        statistic: ``"sinkhorn"``, ``"mmd"`` or ``"energy"``.
        permutations: number of random permutations.
        seed: seed of the permutations.

    Raises:
        RuntimeError: in ``test``, if ``fit`` was not called.
        TypeError: in ``test``, as :func:`two_sample_test`.
        ValueError: in ``test``, as :func:`two_sample_test`.

    Example:
        >>> import torch
        >>> clean = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> TwoSampleTest("mmd").fit(clean[:50]).test(clean[50:] + 1).p_value < 0.01
        True
    """

    def __init__(self, statistic: StatisticName = "energy", permutations: int = 200, seed: int = 0) -> None:
        self.statistic, self.permutations, self.seed = statistic, permutations, seed
        self._clean: Tensor | None = None

    def fit(self, features: Tensor) -> TwoSampleTest:
        """Keep the clean samples ``(N, ...)``."""
        self._clean = features.detach().clone()
        return self

    def test(self, features: Tensor) -> TwoSampleResult:
        """Test a batch ``(M, ...)`` against the clean samples."""
        if self._clean is None:
            raise RuntimeError("TwoSampleTest is not fitted: call fit(features) on clean data first.")
        return two_sample_test(self._clean, features, self.statistic, permutations=self.permutations, seed=self.seed)


def _mmd(points: Tensor) -> Callable[[Tensor, int], Tensor]:
    return partial(energy_distances, -multiscale_kernel(points))


def _energy(points: Tensor) -> Callable[[Tensor, int], Tensor]:
    return partial(energy_distances, euclidean_distances(points))


def _sinkhorn(points: Tensor) -> Callable[[Tensor, int], Tensor]:
    # One blur for all permutations. For the cost |x - y|^2 / 2 and centred points, the mean cost over pairs is the mean squared norm.
    blur = RELATIVE_BLUR * float(points.square().sum(1).mean().sqrt().clamp_min(torch.finfo(points.dtype).tiny ** 0.5))

    def values(orders: Tensor, n: int) -> Tensor:
        # In parts of about 4096 points, to bound the memory of a batch of problems.
        parts = orders.split(max(1, 4096 // orders.shape[1]))
        return torch.cat([sinkhorn_divergence(points[part[:, :n]], points[part[:, n:]], blur=blur) for part in parts])

    return values


_STATISTICS: dict[StatisticName, Callable[[Tensor], Callable[[Tensor, int], Tensor]]] = {
    "sinkhorn": _sinkhorn,
    "mmd": _mmd,
    "energy": _energy,
}

"""Worst-case weights of a batch's samples: a small change of the data's distribution that raises the loss the most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest
from lightning_wdefense._ranks import Ranks, rows_of
from lightning_wdefense._typing import TensorResult
from lightning_wdefense.attacks.labels import class_labels, not_ignored
from lightning_wdefense.attacks.losses import cross_entropy
from lightning_wdefense.modules.outputs import logits_of

CANDIDATES, ROUNDS = 64, 7
"""The temperature is looked for among so many candidates at once, so often: no result has to be read on the way."""
SHARPEST = 1e18
"""Largest inverse temperature, in multiples of one over the range of the losses."""


def kl_ball_weights(losses: Tensor, radius: float) -> Tensor:
    """The weights with the largest weighted loss in a Kullback-Leibler ball around equal weights.

    They solve ``max_w sum_i w_i l_i`` subject to ``sum_i w_i log(N w_i) <= radius``. The solution is ``w_i`` proportional to
    ``exp(l_i / T)``, with the temperature ``T`` at which the divergence is ``radius``. It is found by bisection in float64. Where the ball
    contains the weights that are equal on the ``k`` largest losses and 0 elsewhere (``radius >= log(N / k)``), these are returned.

    Args:
        losses: losses ``(N,)``. Their gradient is not followed.
        radius: of the ball, in nats. 0 gives equal weights.

    Returns:
        Weights ``(N,)`` that sum to 1, in float64, without a gradient. NaN if a loss is not finite.

    Raises:
        ValueError: if the losses are no vector, or the radius is negative or NaN.

    References:
        Hu and Hong, "Kullback-Leibler divergence constrained distributionally robust optimization", 2013.

    Example:
        >>> losses = torch.tensor([0.0, 0.0, 0.0, 1.0])
        >>> kl_ball_weights(losses, 0.1).round(decimals=3)
        tensor([0.1810, 0.1810, 0.1810, 0.4570], dtype=torch.float64)
        >>> kl_ball_weights(losses, 9.0)
        tensor([0., 0., 0., 1.], dtype=torch.float64)
    """
    if losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses must have shape (N,) with N at least 1, got {tuple(losses.shape)}.")
    if not radius >= 0:
        raise ValueError(f"radius must not be negative, got {radius}.")
    losses = losses.detach().to(widest(losses.device))
    below = losses - losses.amax()
    if radius == 0:
        return (0 * below).softmax(0)
    scaled = below / (-below.amin()).clamp_min(torch.finfo(below.dtype).tiny)  # from -1 to 0
    # For losses in an interval of length 1 the divergence at the inverse temperature t is at most t^2 / 8 (Hoeffding's lemma).
    low = scaled.new_tensor(math.log(min(math.sqrt(8 * radius), SHARPEST)))
    high = scaled.new_tensor(math.log(SHARPEST))
    steps = torch.linspace(0, 1, CANDIDATES, device=scaled.device, dtype=scaled.dtype)
    for _ in range(ROUNDS):
        candidates = low + (high - low) * steps
        inside = _divergence(scaled, candidates.exp()) <= radius
        index = (inside.sum() - 1).clamp(0, CANDIDATES - 2)  # the divergence grows with the inverse temperature
        low, high = candidates[index], candidates[index + 1].where(~inside[-1], high)
        low = low.where(~inside[-1], high)
    return (low.exp() * scaled).softmax(0)


def penalty_weights(losses: Tensor, temperature: float) -> Tensor:
    """The weights that solve ``max_w sum_i w_i l_i - temperature * KL(w || equal weights)``: the softmax of ``losses / temperature``.

    Args:
        losses: losses ``(N,)``. Their gradient is not followed.
        temperature: price of a nat, in units of the loss; positive.

    Returns:
        Weights ``(N,)`` that sum to 1, in float64, without a gradient.

    Example:
        >>> penalty_weights(torch.tensor([0.0, 0.0]), 1.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return (losses.detach().to(widest(losses.device)) / temperature).softmax(0)


def _divergence(losses: Tensor, sharpness: Tensor) -> Tensor:
    """``KL(softmax(t l) || equal weights)`` for each inverse temperature ``t``."""
    logits = sharpness.unsqueeze(1) * losses
    log_weights = logits.log_softmax(1)
    return torch.special.xlogy(weights := log_weights.exp(), weights).sum(1) + math.log(len(losses))


@dataclass(frozen=True)
class SampleReweighting:
    """Trains on the worst distribution near the batch: samples with a large loss get a larger weight.

    The weights maximise the weighted loss in a ball of the Kullback-Leibler divergence around equal weights
    (:func:`~lightning_wdefense.defenses.losses.reweighting.kl_ball_weights`). Under torch.distributed they are those of the samples of
    all ranks. To the loss of the training step, ``sum_i (w_i - 1/N) l_i`` is added, where ``l_i`` is the cross-entropy of sample ``i`` on
    the outputs that the step saw. So if the step's own loss is the mean cross-entropy, the sum is the reweighted cross-entropy, and any
    other terms of the step's loss stay as they are. The weights are constants for the gradient.

    A recipe with reweighting also logs ``reweighting`` (what is added), ``effective_samples`` (``1 / sum_i w_i^2``) and ``max_weight``
    (the largest weight, in multiples of ``1/N``).

    Args:
        radius: of the ball, in nats. ``None`` for a penalty instead.
        temperature: price of a nat of divergence, in units of the loss, instead of a ball: the weights are
            ``softmax(l / temperature)``.
        loss: ``(outputs, labels) -> (N,)``, the losses of the samples, for a task that is no classification or has another loss;
            ``None`` for cross-entropy.

    Raises:
        ValueError: unless exactly one of ``radius`` and ``temperature`` is given; if the radius is negative or the temperature not
            positive.

    References:
        Liu, Wang, Zhu, Miao, Gao, "Provable robust overfitting mitigation in Wasserstein distributionally robust optimization"
        (SR-WDRO), ICLR 2025.
        Birrell, Ebrahimi, "Adversarially robust learning with optimal transport regularized divergences" (ARMOR_D), 2023.

    Example:
        >>> from lightning_wdefense import Recipe, ThreatModel
        >>> recipe = Recipe.named("pgd-at", ThreatModel(eps=0.1), reweighting=SampleReweighting(radius=0.1))
        >>> recipe.reweighting.weights(torch.tensor([0.0, 1.0])).round(decimals=3)
        tensor([0.2800, 0.7200], dtype=torch.float64)
    """

    radius: float | None = None
    temperature: float | None = None
    loss: Callable[[Any, Any], TensorResult] | None = None

    def __post_init__(self) -> None:
        if (self.radius is None) == (self.temperature is None):
            raise ValueError(
                f"SampleReweighting needs either radius= (a ball) or temperature= (a penalty), got radius={self.radius}, "
                f"temperature={self.temperature}."
            )
        if self.radius is not None and not 0 <= self.radius < math.inf:
            raise ValueError(f"radius must be finite and not negative, got {self.radius}.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}.")

    def weights(self, losses: Tensor) -> Tensor:
        """The weights ``(N,)`` of samples with these losses ``(N,)``; they sum to 1."""
        if self.radius is not None:
            return kl_ball_weights(losses, self.radius)
        assert self.temperature is not None
        return penalty_weights(losses, self.temperature)

    def added(self, outputs: Any, labels: Any, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        """What reweighting adds to this rank's loss, and measurements of the weights.

        Args:
            outputs: the model's outputs that the training step saw; ``None`` if there are none.
            labels: labels of the batch.
            ranks: the ranks that train the model together.

        Raises:
            ValueError: if there is no loss for each sample: no outputs, labels that are no classes, or a callable that returns
                something else.
        """
        losses = self._losses(outputs, labels)
        sizes = ranks.row_counts(losses)
        weights = self.weights(ranks.gather(losses.detach(), sizes))
        excess = (weights - 1 / len(weights))[rows_of(ranks.rank, sizes)]
        # Data-parallel training averages the losses of the ranks, where the weights need their sum.
        added = ranks.size * (excess.to(losses.dtype) * losses).sum()
        return added, {"effective_samples": 1 / weights.square().sum(), "max_weight": len(weights) * weights.amax()}

    def _losses(self, outputs: Any, labels: Any) -> Tensor:
        losses = _cross_entropies(outputs, labels) if self.loss is None else self.loss(outputs, labels)
        if not isinstance(losses, Tensor) or losses.ndim != 1:  # a rank may have no samples
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"Reweighting needs one loss for each sample, shape (N,), got {found}. Give SampleReweighting(loss=...) a callable "
                "(outputs, labels) that returns them."
            )
        return losses


def _cross_entropies(outputs: Any, labels: Any) -> Tensor:
    """The cross-entropy of each sample, ``(N,)``, whose mean is that of all elements (pixels) that are not ignored."""
    try:
        labels = class_labels(labels, outputs, check_values=True)
        losses = cross_entropy(outputs, labels)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Reweighting needs the cross-entropy of each sample, which cannot be computed: {error} Say where the logits are with outputs= or "
            "model=, give SampleReweighting(loss=...) a callable (outputs, labels) that returns one loss per sample, or leave reweighting= "
            "out."
        ) from error
    elements = not_ignored(labels).sum() if not labels.is_floating_point() else logits_of(outputs)[:, 0].numel()
    return losses * (len(losses) / elements) if logits_of(outputs).ndim > 2 else losses

"""Detectors that use only a classifier's logits: maximum softmax probability and energy."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense.detection.base import Detector, Reads
from lightning_wdefense.modules.outputs import float32_or_better, logits_of


def max_softmax_score(logits: Tensor) -> Tensor:
    """``-log max_k p_k`` of each sample, from 0 (certain) to ``log K``.

    The order is the same as for ``1 - max_k p_k``, but the scores of confident predictions do not all round to 0.

    Args:
        logits: ``(N, K)``, or ``(N,)`` or ``(N, 1)`` of a binary classifier.

    Returns:
        ``(N,)``, in float32 or better.

    References:
        Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in neural networks",
        2017.

    Example:
        >>> import torch
        >>> max_softmax_score(torch.tensor([[0.0, 0.0], [30.0, 0.0]]))
        tensor([6.9315e-01, 9.3576e-14])
    """
    logits = float32_or_better(logits_of(logits))
    largest, index = logits.max(1, keepdim=True)
    others = (logits - largest).scatter(1, index, -torch.inf)
    return others.exp().sum(1).log1p()


def energy_score(logits: Tensor) -> Tensor:
    """The energy ``-log sum_k exp(z_k)`` of each sample. It is low if a class has a large logit.

    Args:
        logits: ``(N, K)``, or ``(N,)`` or ``(N, 1)`` of a binary classifier.

    Returns:
        ``(N,)``, in float32 or better.

    References:
        Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.

    Example:
        >>> import torch
        >>> energy_score(torch.tensor([[0.0, 0.0], [30.0, 0.0]]))
        tensor([ -0.6931, -30.0000])
    """
    return -float32_or_better(logits_of(logits)).logsumexp(1)


class MaxSoftmax(Detector):
    """Negative log of the largest class probability, see :func:`max_softmax_score`. The detector reads logits and needs no fit.

    Example:
        >>> import torch
        >>> MaxSoftmax().score(torch.zeros(2, 10)).exp()
        tensor([10., 10.])
    """

    name: ClassVar[str] = "max-softmax"
    reads: ClassVar[Reads] = "outputs"
    learns: ClassVar[bool] = False

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> None:
        """Nothing."""

    def score_layer(self, fitted: None, features: Tensor) -> Tensor:
        """Scores ``(N,)``."""
        return max_softmax_score(features)


class Energy(Detector):
    """The classifier's energy, see :func:`energy_score`. The detector reads logits and needs no fit.

    Example:
        >>> import torch
        >>> Energy().score(torch.zeros(2, 10)).exp()
        tensor([0.1000, 0.1000])
    """

    name: ClassVar[str] = "energy"
    reads: ClassVar[Reads] = "outputs"
    learns: ClassVar[bool] = False

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> None:
        """Nothing."""

    def score_layer(self, fitted: None, features: Tensor) -> Tensor:
        """Scores ``(N,)``."""
        return energy_score(features)

"""Certificates of smoothed classifiers, and the accuracy that they certify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.metrics import AccuracyCurve, area_under_accuracy_curve

ABSTAIN = -1
"""The class index that means "abstain"."""


class Certificate(NamedTuple):
    """The result of a smoothed classifier's ``certify``, such as :meth:`GaussianSmoothing.certify`.

    Attributes:
        classes: certified class of each sample, ``(N,)``; -1 where the classifier abstains.
        radii: certified radius of each sample, ``(N,)``: L2 distances in data units for :class:`GaussianSmoothing`, 1-Wasserstein
            distances in shares of mass times pixels for :class:`WassersteinSmoothing`. Within this distance the smoothed classifier
            predicts the class; 0 where the classifier abstains.

    Example:
        >>> certificate = Certificate(torch.tensor([3, -1]), torch.tensor([0.2, 0.0]))
        >>> certificate.classes != ABSTAIN
        tensor([ True, False])
    """

    classes: Tensor
    radii: Tensor


def certified_accuracy_curve(certificate: Certificate, labels: Tensor, epsilons: Sequence[float]) -> AccuracyCurve:
    """Certified accuracy at each eps, and the area under the curve.

    The certified accuracy at eps is the share of samples whose certified class is correct and whose certified radius is above eps.

    Args:
        certificate: result of ``certify``.
        labels: integer classes ``(N,)``.
        epsilons: values of eps ``(E,)``, strictly increasing from 0, in the units of the certificate's radii.

    Returns:
        The curve. Accuracies are shares in [0, 1] and never increase with eps.

    Raises:
        ValueError: if there is not one integer label per sample, or ``epsilons`` does not start at 0 and increase strictly.

    Example:
        >>> import torch
        >>> certificate = Certificate(torch.tensor([0, 1, -1]), torch.tensor([0.3, 0.1, 0.0]))
        >>> certified_accuracy_curve(certificate, torch.tensor([0, 1, 1]), [0.0, 0.2]).accuracies
        tensor([0.6667, 0.3333])
    """
    if labels.shape != certificate.classes.shape or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(certificate.classes)} integers, one per sample, got {labels.dtype} {tuple(labels.shape)}."
        )
    right = certificate.classes == labels
    accuracies = torch.stack([(right & (certificate.radii > eps)).float().mean() for eps in epsilons])
    area = area_under_accuracy_curve(epsilons, accuracies)
    return AccuracyCurve(accuracies.new_tensor(list(epsilons)), accuracies, area)

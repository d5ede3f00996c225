"""Detectors by name, for configuration files and string arguments."""

from __future__ import annotations

from typing import Any

from lightning_wdefense._names import unknown_name
from lightning_wdefense.detection.base import Detector
from lightning_wdefense.detection.critic import CriticScore
from lightning_wdefense.detection.feature_squeezing import FeatureSqueezing
from lightning_wdefense.detection.kernel_density import KernelDensity
from lightning_wdefense.detection.logits import Energy, MaxSoftmax
from lightning_wdefense.detection.mahalanobis import Mahalanobis
from lightning_wdefense.detection.neighbors import LID, KNNDistance

DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector
    for detector in (MaxSoftmax, Energy, Mahalanobis, KNNDistance, LID, KernelDensity, FeatureSqueezing, CriticScore)
}
"""All detectors by name. Each has its own options."""


def get_detector(name: str, **options: Any) -> Detector:
    """A detector by its name.

    Args:
        name: one of ``DETECTORS``.
        **options: arguments of the detector's constructor; ``"feature-squeezing"`` needs ``threat``, ``"critic"`` needs ``critic``.

    Raises:
        ValueError: if the name does not exist; the message lists the nearest names.

    Example:
        >>> get_detector("knn", k=3).k
        3
    """
    if name not in DETECTORS:
        raise ValueError(unknown_name("detector", name, DETECTORS))
    return DETECTORS[name](**options)

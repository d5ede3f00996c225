"""Detectors of adversarial inputs: ``fit(features, labels)`` on clean data, then ``score(features)``; two-sample tests."""

from lightning_wdefense.detection.base import Detector
from lightning_wdefense.detection.critic import CriticScore
from lightning_wdefense.detection.feature_squeezing import FeatureSqueezing
from lightning_wdefense.detection.kernel_density import KernelDensity
from lightning_wdefense.detection.logits import Energy, MaxSoftmax, energy_score, max_softmax_score
from lightning_wdefense.detection.mahalanobis import Mahalanobis
from lightning_wdefense.detection.neighbors import LID, KNNDistance
from lightning_wdefense.detection.registry import DETECTORS, get_detector
from lightning_wdefense.detection.two_sample import TwoSampleResult, TwoSampleTest, two_sample_test

__all__ = [
    "DETECTORS",
    "LID",
    "CriticScore",
    "Detector",
    "Energy",
    "FeatureSqueezing",
    "KNNDistance",
    "KernelDensity",
    "Mahalanobis",
    "MaxSoftmax",
    "TwoSampleResult",
    "TwoSampleTest",
    "energy_score",
    "get_detector",
    "max_softmax_score",
    "two_sample_test",
]

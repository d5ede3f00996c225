"""The table of detectors that drives their contract tests: a new detector joins by one line."""

from __future__ import annotations

import torch
from torch import nn

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.detection import (
    LID,
    CriticScore,
    Energy,
    FeatureSqueezing,
    KernelDensity,
    KNNDistance,
    Mahalanobis,
    MaxSoftmax,
)

WIDTH = 6


def linear(outputs: int) -> nn.Module:
    layer = nn.Linear(WIDTH, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, WIDTH, generator=torch.Generator().manual_seed(0)))
        layer.bias.zero_()
    return layer


DETECTOR_CASES = {
    "max-softmax": MaxSoftmax,
    "energy": Energy,
    "mahalanobis": Mahalanobis,
    "knn": lambda: KNNDistance(k=5),
    "lid": lambda: LID(k=5),
    "kernel-density": KernelDensity,
    "feature-squeezing": lambda: FeatureSqueezing(ThreatModel(bounds=(-8.0, 8.0)), linear(4), bits=3),
    "critic": lambda: CriticScore(linear(1)),
}

"""Optimal transport on tensors: Sinkhorn costs and divergences, sliced distances and critics, usable without Lightning."""

from lightning_wdefense.transport.critic.network import WassersteinCritic
from lightning_wdefense.transport.critic.training import CriticDistance, CriticTraining, CriticUpdate, critic_distance
from lightning_wdefense.transport.entropic import (
    SinkhornConvergenceWarning,
    SinkhornDivergence,
    SinkhornResult,
    WarmStart,
    sinkhorn,
    sinkhorn_divergence,
)
from lightning_wdefense.transport.sliced.distance import SlicedWasserstein, sliced_wasserstein

__all__ = [
    "CriticDistance",
    "CriticTraining",
    "CriticUpdate",
    "SinkhornConvergenceWarning",
    "SinkhornDivergence",
    "SinkhornResult",
    "SlicedWasserstein",
    "WarmStart",
    "WassersteinCritic",
    "critic_distance",
    "sinkhorn",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]

"""Optimal transport on tensors: Sinkhorn costs and divergences, sliced distances and critics, usable without Lightning."""

from lightning_wdefense.transport.critic import WassersteinCritic
from lightning_wdefense.transport.critic_training import CriticDistance, CriticTraining, CriticUpdate, critic_distance
from lightning_wdefense.transport.divergence import SinkhornDivergence, sinkhorn_divergence
from lightning_wdefense.transport.entropic import SinkhornConvergenceWarning, SinkhornResult, sinkhorn
from lightning_wdefense.transport.sliced import SlicedWasserstein, sliced_wasserstein
from lightning_wdefense.transport.warm_start import WarmStart

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

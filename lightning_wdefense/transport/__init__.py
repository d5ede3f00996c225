"""Optimal transport on tensors: differentiable Sinkhorn costs and divergences and sliced distances, usable without Lightning."""

from lightning_wdefense.transport.divergence import SinkhornDivergence, sinkhorn_divergence
from lightning_wdefense.transport.entropic import SinkhornConvergenceWarning, SinkhornResult, sinkhorn
from lightning_wdefense.transport.sliced import SlicedWasserstein, sliced_wasserstein
from lightning_wdefense.transport.warm_start import WarmStart

__all__ = [
    "SinkhornConvergenceWarning",
    "SinkhornDivergence",
    "SinkhornResult",
    "SlicedWasserstein",
    "WarmStart",
    "sinkhorn",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]

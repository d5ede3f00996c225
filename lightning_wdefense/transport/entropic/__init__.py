"""Entropic optimal transport between point clouds, and the Sinkhorn divergence."""

from lightning_wdefense.transport.entropic.divergence import SinkhornDivergence, sinkhorn_divergence
from lightning_wdefense.transport.entropic.evaluation import SinkhornConvergenceWarning
from lightning_wdefense.transport.entropic.transport import SinkhornResult, sinkhorn
from lightning_wdefense.transport.entropic.warm_start import WarmStart

__all__ = [
    "SinkhornConvergenceWarning",
    "SinkhornDivergence",
    "SinkhornResult",
    "WarmStart",
    "sinkhorn",
    "sinkhorn_divergence",
]

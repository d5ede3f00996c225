"""Dual potentials of the transport of a measure to itself: one vector, without annealing."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.constants import ABSORBED, AVERAGING, SELF_ACCURACY
from lightning_wdefense.transport.entropic.solver.arrays import Array, array, longest, namespace, norm, tensor
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel
from lightning_wdefense.transport.entropic.solver.potentials import Solution


def solve_symmetric(
    kernel: GibbsKernel,
    eps: float | Tensor,
    *,
    tol: float,
    max_iter: int,
) -> Solution:
    """Potentials of the transport of a measure to itself, found by averaging.

    For a cost that is zero on the diagonal the scaling lies between ``n^-1/2`` and ``a^-1/2`` at every temperature.
    """
    a = kernel.a
    xp = namespace(a)
    root_a, root_mass = array(xp, a.sqrt()), array(xp, a.sum(-1).sqrt())
    g = torch.zeros_like(a)
    kernel.absorb(g, eps)
    share = kernel.share if isinstance(kernel.share, float) else array(xp, kernel.share)

    def gap_at(w: Array) -> Array:
        """The step from ``w`` to its exact answer, in units of the temperature."""
        log_sums = kernel.log_sums_at(tensor(w))
        return array(xp, kernel.weighted(log_sums)) * -share - (array(xp, kernel.scaled_g) + w)

    w = 0.5 * gap_at(array(xp, g))
    for n_iter in range(1, max_iter + 1):
        gap = gap_at(w)
        error = norm(xp, root_a * xp.expm1(gap * (-1 / share))) / root_mass
        done = error <= SELF_ACCURACY * tol
        if n_iter == max_iter or bool(done.all()):
            break
        w = w + AVERAGING * gap if w.ndim == 1 else xp.where(done[:, None], w, w + AVERAGING * gap)
        if longest(xp, w) > ABSORBED:
            g, w = g + eps * tensor(w), xp.zeros_like(w)
            kernel.absorb(g, eps)
    scaled = kernel.scaled_g + tensor(w)
    kernel.symmetrise(scaled)
    f = kernel.row_potential()
    error = torch.as_tensor(error, dtype=a.dtype, device=a.device)
    return Solution(f, torch.where(a > 0, eps * scaled, f), n_iter, error)

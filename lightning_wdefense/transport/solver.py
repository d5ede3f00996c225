"""Dual potentials of entropic optimal transport: log-domain Sinkhorn, annealed, with Anderson acceleration.

Everything is batched: costs ``(B, N, M)``, weights ``(B, N)`` and ``(B, M)``, one temperature for each problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

COOLING = 4.0
"""Ratio between a temperature of the annealing and the next one."""

WARM_UP = 0.005
"""Marginal error at which a temperature above the final one is left; a worse start costs more than it saves."""

MEMORY = 5
"""Past steps that the Anderson extrapolation combines."""

ROUNDING = 8
"""Units in the last place by which a value may fall and still count as not fallen."""

MAX_EXPONENT = 40.0
"""The error is compared with a tolerance, so a larger exponent would only overflow."""


class Potentials(NamedTuple):
    """Solution of a batch of problems: ``f`` is the exact answer to ``g``, so the rows of the plan are exact."""

    f: Tensor
    g: Tensor
    n_iter: int
    error: Tensor


class _Iterate(NamedTuple):
    """One evaluation of the Sinkhorn map: at ``g``, the answer ``f``, where ``g`` goes, marginal error and value."""

    f: Tensor
    g: Tensor
    image: Tensor
    error: Tensor
    value: Tensor


def solve(
    cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None, *, tol: float, max_iter: int
) -> Potentials:
    """Potentials of the transport of ``a`` to ``b``, to a relative marginal error of ``tol``.

    Annealed from the largest cost down: at a high temperature the problem is easy, and its solution is a good start
    for the next one, where a cold start would take many more iterations. A problem that needs fewer temperatures than
    others of its batch waits at its first one, so that it takes the same path as it would alone.
    """
    levels = (cost.amax((-2, -1)) / eps).clamp(min=1).log().div(math.log(COOLING)).floor()
    g, n_iter = torch.zeros_like(b), 0
    for level in range(int(levels.max()), -1, -1):
        height = levels.clamp(max=level)
        sweep = _sweep(cost, a, b, eps * COOLING**height, rho)
        level_tol = torch.where(height > 0, max(tol, WARM_UP), tol)
        solution = _fixed_point(sweep, g, b, level_tol, max(1, max_iter - n_iter))
        g, n_iter = solution.g, n_iter + solution.n_iter
    return solution._replace(n_iter=n_iter)


def solve_symmetric(
    cost: Tensor, a: Tensor, eps: Tensor, rho: float | None, *, tol: float, max_iter: int
) -> Potentials:
    """Potentials of the transport of ``a`` to itself: one vector, found by averaging (no annealing is needed).

    The averaged map halves the error at each step or better: the plan of a positive kernel has no negative eigenvalue.
    """
    softmin = _softmin(cost, a.log(), eps, rho)

    def step(g: Tensor) -> _Iterate:
        f = softmin(g)
        return _Iterate(f, g, 0.5 * (f + g), _marginal_error(g, f, a, eps, rho), semi_dual(f, g, a, a, eps, rho))

    return _fixed_point(step, torch.zeros_like(a), a, tol, max_iter)


def transport_plan(
    potentials: Potentials, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None
) -> Tensor:
    """The plan ``(B, N, M)``, its rows exact: the rows of a softmax sum to one whatever the rounding."""
    logits = (b.log() + potentials.g / eps[:, None])[:, None, :] - cost / eps[:, None, None]
    return (a * density(potentials.f, rho))[:, :, None] * logits.softmax(-1)


def density(potential: Tensor, rho: float | None) -> Tensor:
    """Mass transported at each point, as a share of its weight: all of it, unless the transport is unbalanced."""
    return torch.ones_like(potential) if rho is None else (-potential / rho).exp()


def price(potential: Tensor, rho: float | None) -> Tensor:
    """What a unit of weight adds to the dual value."""
    return potential if rho is None else -rho * (-potential / rho).expm1()


def semi_dual(f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """Dual value ``(B,)`` where ``f`` is the answer to ``g``, so that the mass of the plan is that of its rows.

    Each plain step increases it, and its error is the square of that of the potentials.
    """
    entropy = (a * density(f, rho)).sum(-1) - a.sum(-1) * b.sum(-1)
    return (a * price(f, rho)).sum(-1) + (b * price(g, rho)).sum(-1) - eps * entropy


def _sweep(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None) -> Callable[[Tensor], _Iterate]:
    softmin_rows, softmin_columns = _softmin(cost, b.log(), eps, rho), _softmin(cost.mT, a.log(), eps, rho)

    def step(g: Tensor) -> _Iterate:
        f = softmin_rows(g)
        image = softmin_columns(f)
        return _Iterate(f, g, image, _marginal_error(g, image, b, eps, rho), semi_dual(f, g, a, b, eps, rho))

    return step


def _softmin(cost: Tensor, log_weights: Tensor, eps: Tensor, rho: float | None) -> Callable[[Tensor], Tensor]:
    scaled = cost / eps[:, None, None]
    eps = eps[:, None]
    factor = -eps if rho is None else -eps * rho / (rho + eps)

    def softmin(potential: Tensor) -> Tensor:
        return factor * ((log_weights + potential / eps)[:, None, :] - scaled).logsumexp(-1)

    return softmin


def _marginal_error(g: Tensor, image: Tensor, b: Tensor, eps: Tensor, rho: float | None) -> Tensor:
    """L1 distance between the marginal of the plan and the one it should have, as a share of the mass."""
    eps = eps[:, None]
    if rho is None:
        exponent, target = (g - image) / eps, b
    else:
        target = b * density(g, rho)
        exponent = (g - image) * (1 / eps + 1 / rho)
    return (target * exponent.clamp(max=MAX_EXPONENT).expm1()).abs().sum(-1) / target.sum(-1)


def _fixed_point(
    step: Callable[[Tensor], _Iterate], g: Tensor, weights: Tensor, tol: Tensor | float, max_iter: int
) -> Potentials:
    """Iterate ``g = step(g).image`` until the error of every problem is below ``tol``.

    Anderson (1965) extrapolation from the last steps, which by itself may wander off. Plain steps never lower the dual
    value, so a problem whose value fell goes back to the plain step that was not taken, and starts to remember anew.
    """
    slack = ROUNDING * torch.finfo(g.dtype).eps
    g_steps = g.new_zeros(len(g), MEMORY, g.shape[1])
    r_steps = torch.zeros_like(g_steps)
    last = step(g)
    g, plain = last.image, torch.ones_like(last.error, dtype=torch.bool)
    for n_iter in range(1, max_iter + 1):
        done = last.error <= tol
        if bool(done.all()):
            break
        here = step(torch.where(done[:, None], last.g, g))
        # Written so that a value of NaN is refused too.
        refused = ~plain & ~(here.value >= last.value - slack * last.value.abs())
        residual = here.image - here.g
        slot = n_iter % MEMORY
        g_steps[:, slot], r_steps[:, slot] = here.g - last.g, residual - (last.image - last.g)
        g_steps, r_steps = (steps.masked_fill(refused[:, None, None], 0) for steps in (g_steps, r_steps))
        accelerated = here.image - _anderson(g_steps, r_steps, residual, weights)
        g = _choose(refused, last.image, accelerated)
        last = _Iterate(*(_choose(refused, old, new) for old, new in zip(last, here, strict=True)))
        plain = refused
    return Potentials(last.f, last.g, n_iter, last.error)


def _choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *(1,) * (one.ndim - 1)), one, other)


def _anderson(g_steps: Tensor, r_steps: Tensor, residual: Tensor, weights: Tensor) -> Tensor:
    """Correction to the plain step: the combination of past steps that best cancels the residual, in L2(weights)."""
    weighted = r_steps * weights[:, None, :]
    # Not as matrix products, which could run in TF32.
    gram = (weighted[:, :, None, :] * r_steps[:, None, :, :]).sum(-1)
    right = (weighted * residual[:, None, :]).sum(-1, keepdim=True)
    ridge = 1e-7 * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(gram.dtype).tiny
    gram = gram + ridge[:, None, None] * torch.eye(MEMORY, dtype=gram.dtype, device=gram.device)
    mixture = torch.linalg.solve_ex(gram, right)[0]
    return ((g_steps + r_steps) * mixture).sum(1)

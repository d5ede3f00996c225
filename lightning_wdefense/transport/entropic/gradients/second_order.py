"""First derivatives that can be differentiated again: the plan as a function of the cost, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_wdefense.transport.entropic.problem.problem import Pair
from lightning_wdefense.transport.entropic.solver.optimum import Optimum, of_weights

WEIGHT: Mapping[Pair, float] = {"xy": 1.0, "xx": -0.5, "yy": -0.5}
"""What the value of each transport counts in a divergence."""

NO_CURVATURE = 1e-13
"""Curvature, as a share of the largest possible, that is only rounding (of float64)."""

MAX_STEPS = 1000
"""Steps of the conjugate gradients: a bound against rounding, not a budget."""


def gradients_of_weights_and_costs(
    costs: Mapping[Pair, Tensor], a: Tensor, b: Tensor, optima: Mapping[Pair, Optimum], eps: Tensor, rho: float | None
) -> tuple[dict[Pair, Tensor], Tensor, Tensor]:
    """Derivatives of the sum of all transports, weighted by :data:`WEIGHT`, as differentiable functions of the arguments.

    Args:
        costs: ``(B, N, M)`` for ``"xy"``, ``(B, N, N)`` for ``"xx"``, ``(B, M, M)`` for ``"yy"``.
        a: weights ``(B, N)``.
        b: weights ``(B, M)``.
        optima: the solutions, at which the derivatives are taken.
        eps: temperatures ``(B,)``.
        rho: price of creating or destroying mass, or ``None``.

    Returns:
        Derivatives in the costs (weighted plans), in ``a`` and in ``b``.
    """
    eps, of_a, of_b, plans = eps.unsqueeze(-1), torch.zeros_like(a), torch.zeros_like(b), {}
    for pair, cost in costs.items():
        rows, columns = (b if pair == "yy" else a), (a if pair == "xx" else b)
        f, g = _Potentials.apply(cost, rows, columns, optima[pair].f, optima[pair].g, eps, rho)
        plans[pair] = WEIGHT[pair] * _plan(cost, rows, columns, f, g, eps)
        of_rows = WEIGHT[pair] * of_weights(f, columns, eps, rho)
        of_columns = WEIGHT[pair] * of_weights(g, rows, eps, rho)
        of_a = of_a + (of_rows if pair != "yy" else 0) + (of_columns if pair == "xx" else 0)
        of_b = of_b + (of_columns if pair != "xx" else 0) + (of_rows if pair == "yy" else 0)
    return plans, of_a, of_b


def euclidean_cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    """``|x - y|^p / p``, ``(B, N, M)``, by operations that can be differentiated twice; zero gradients at distance zero."""
    if p == 2:
        centre = 0.5 * (x.detach().mean(-2, keepdim=True) + y.detach().mean(-2, keepdim=True)).double()
        wide_x, wide_y = x.double() - centre, y.double() - centre
        squares = wide_x.square().sum(-1).unsqueeze(-1) + wide_y.square().sum(-1).unsqueeze(-2)
        return (0.5 * squares - wide_x @ wide_y.mT).to(x.dtype)
    square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: Tensor) -> Tensor:
    exponents = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps.unsqueeze(-1)
    # A point without weight may have any potential, so its exponents may be too large.
    used = (a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * exponents.where(used, 0).exp()


class _Potentials(torch.autograd.Function):
    """The potentials, which are given, as a function of cost and weights.

    They fulfil ``sum_j P_ij = a_i exp(-f_i / rho)`` and the same for columns. Differentiated, that is a linear system with the
    symmetric matrix ``[[k diag(P 1), P], [P^T, k diag(P^T 1)]]``, ``k = 1 + eps / rho``; the backward pass solves it.
    """

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: Tensor, rho: float | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cost, a, b, f, g, eps)
        ctx.rho = rho
        return f.clone(), g.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_g: Tensor) -> tuple[Tensor | None, ...]:
        cost, a, b, f, g, eps = (tensor.double() for tensor in ctx.saved_tensors)
        dtype = ctx.saved_tensors[0].dtype
        plan = _plan(cost, a, b, f, g, eps)
        k = torch.ones_like(eps) if ctx.rho is None else 1 + eps / ctx.rho
        p, q = _solve(plan, k, grad_f.double(), grad_g.double(), balanced=ctx.rho is None, dtype=dtype)
        # What depends on a weight, by the other side's constraints: P_ij / a_i, which is finite where a_i is zero too.
        kernel = _plan(cost, torch.ones_like(a), torch.ones_like(b), f, g, eps)
        of_cost = plan * (p.unsqueeze(-1) + q.unsqueeze(-2))
        of_a = -eps * (kernel @ (b * q).unsqueeze(-1)).squeeze(-1)
        of_b = -eps * (kernel.mT @ (a * p).unsqueeze(-1)).squeeze(-1)
        return of_cost.to(dtype), of_a.to(dtype), of_b.to(dtype), None, None, None, None


def _solve(
    plan: Tensor, k: Tensor, right_f: Tensor, right_g: Tensor, *, balanced: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Solve ``[[k diag(r), P], [P^T, k diag(c)]] (p, q) = (right_f, right_g)`` by preconditioned conjugate gradients on ``q``.

    Balanced, potentials are known up to a constant that moves from one to the other, so the system is singular; what is asked
    of them does not depend on that constant, so the right side is in its range.
    """
    rows, columns = k * plan.sum(-1), k * plan.sum(-2)
    inverse_rows, inverse_columns = (torch.where(t > 0, 1 / t, 0) for t in (rows, columns))

    def times(vector: Tensor) -> Tensor:
        across = inverse_rows * (plan @ vector.unsqueeze(-1)).squeeze(-1)
        return columns * vector - (plan.mT @ across.unsqueeze(-1)).squeeze(-1)

    residual = right_g - (plan.mT @ (inverse_rows * right_f).unsqueeze(-1)).squeeze(-1)
    residual = torch.where(columns > 0, residual, 0)
    if balanced:
        residual = residual - columns * (residual.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True))
    q, z = torch.zeros_like(residual), inverse_columns * residual
    direction, product = z, (residual * z).sum(-1, keepdim=True)
    goal = product * torch.finfo(dtype).eps ** 1.5
    for _ in range(MAX_STEPS):
        image = times(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        # Points that exchange no mass with others have no curvature, and ask for none: only rounding is left of them.
        active = (product > goal) & (curvature > NO_CURVATURE * (columns * direction.square()).sum(-1, keepdim=True))
        if not bool(active.any()):
            break
        step = torch.where(active, product / curvature, 0)
        q, residual = q + step * direction, residual - step * image
        z, last = inverse_columns * residual, product
        product = (residual * z).sum(-1, keepdim=True)
        direction = z + torch.where(active, product / last, 0) * direction
    p = inverse_rows * (right_f - (plan @ q.unsqueeze(-1)).squeeze(-1))
    return p, q

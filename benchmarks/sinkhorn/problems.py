"""Problems of the Sinkhorn benchmark, and their converged solution in float64, which owes nothing to the package.

Cost is ``|x - y|^2 / 2``, ``eps = blur^2`` and weights are uniform throughout.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.files import load, save

CLASSES = 10
COARSE_TOL = 1e-3
TOL = 1e-10
MIN_DAMPING = 1e-14
ROUNDING = 1e-15


class Row(NamedTuple):
    """Problems of one kind and size: ``batch`` of them at once, with one blur."""

    family: str
    n: int
    d: int
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.family} {f'{self.batch}x' if self.batch > 1 else ''}{self.n}x{self.d}"


VALUE_TARGET = 1e-3
"""Largest relative error of a value."""

ROWS = [
    Row("adv", 64, 10),
    Row("adv", 128, 10),
    Row("adv", 128, 128),
    Row("adv", 256, 64),
    Row("adv", 256, 512),
    Row("adv", 512, 512),
    Row("adv", 1024, 64),
    Row("adv", 64, 10, batch=32),
    Row("adv", 128, 128, batch=32),
    Row("gauss", 256, 10),
    Row("gauss", 1024, 64),
    Row("advraw", 256, 512),
    Row("adv", 2048, 64),
    Row("adv", 4096, 512),
]
ROBUSTNESS_ROWS = [
    *(Row("adv", n, d) for n, d in ((64, 10), (128, 10), (128, 128), (256, 64))),
    *(Row("gauss", n, d) for n, d in ((64, 2), (256, 10), (256, 64), (128, 512))),
]


def problem(family: str, n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clouds ``(n, d)`` in float64.

    ``adv``: clean and adversarial features of a minibatch, paired, normalised to unit length; ``advraw``: the same at
    their raw scale, ``|x|^2 ~ d``; ``gauss``: independent clouds, shifted by a half in ten dimensions.
    """
    generator = torch.Generator().manual_seed(1000 * seed + n + 7 * d)
    if family == "gauss":
        x = _normal(generator, n, d)
        return x, _normal(generator, n, d) + 0.5 * math.sqrt(10 / d)
    x, y = _features(generator, n, d)
    if family == "adv":
        return x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    if family == "advraw":
        return x * math.sqrt(d), y * math.sqrt(d)
    raise ValueError(f"family must be 'adv', 'advraw' or 'gauss', got {family!r}.")


def _features(
    generator: torch.Generator, n: int, d: int, *, spread: float = 0.6, flipped: float = 0.3, noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Clusters, and the same points with noise, a share ``flipped`` of them moved most of the way to another class."""
    centres = _normal(generator, CLASSES, d) / math.sqrt(d)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    x = centres[labels] + spread * _normal(generator, n, d) / math.sqrt(d)
    targets = (labels + 1 + torch.randint(CLASSES - 1, (n,), generator=generator)) % CLASSES
    fooled = (torch.rand(n, generator=generator, dtype=torch.float64) < flipped).double()[:, None]
    y = x + 0.7 * fooled * (centres[targets] - centres[labels]) + noise * _normal(generator, n, d) / math.sqrt(d)
    return x, y


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def half_squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Cost ``(..., N, M)``; zero, not a rounding error, between a point and itself."""
    squares = 0.5 * x.square().sum(-1)[..., :, None] + 0.5 * y.square().sum(-1)[..., None, :]
    cost = (squares - x @ y.mT).clamp(min=0)
    if x is y:
        cost.diagonal(dim1=-2, dim2=-1).zero_()
    return cost


class Reference(NamedTuple):
    """Converged divergence and gradients; the marginal error that the worst of the three solves was left with."""

    value: float
    grad_x: Tensor
    grad_y: Tensor
    mean_cost: float
    marginal_error: float


def reference(x: Tensor, y: Tensor, eps: float, cache: Path) -> Reference:
    """Solution of a float64 problem, kept in the folder ``cache``."""
    key = hashlib.sha256(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes() + repr(eps).encode()).hexdigest()[:32]
    path = cache / f"{key}.pt"
    if (found := load(path)) is not None:
        return Reference(**found)
    solution = _solve(x, y, eps)
    save(path, solution._asdict())
    return solution


class Errors(NamedTuple):
    """How far a solution is from the reference.

    ``value`` is relative to the divergence, or to a thousandth of the mean cost where the divergence is smaller still:
    so a value error of 1e-3 is also met by an absolute error of 1e-6 of the mean cost.
    """

    value: float
    gradient: float


def errors(value: Tensor | float, grad_x: Tensor, grad_y: Tensor, exact: Reference) -> Errors:
    """Errors of one solution: of the value, and of both gradients together in relative L2 norm."""
    scale = max(abs(exact.value), 1e-3 * exact.mean_cost)
    found, wanted = (torch.cat([x.double().cpu(), y.double().cpu()]) for x, y in ((grad_x, grad_y), exact[1:3]))
    return Errors(abs(float(value) - exact.value) / scale, float((found - wanted).norm() / wanted.norm()))


class Case(NamedTuple):
    """The problem of a row and a seed: clouds in float32, the absolute blur, the solution of each of its batch."""

    x: Tensor
    y: Tensor
    blur: float
    exact: list[Reference]


def make_case(row: Row, relative_blur: float, seed: int, cache: Path, device: str = "cpu") -> Case:
    """Clouds ``(N, D)``, or ``(B, N, D)`` for a batch; the blur is relative to the root of the mean cost."""
    clouds = [
        [each.to(device) for each in problem(row.family, row.n, row.d, seed * row.batch + i)] for i in range(row.batch)
    ]
    blur = relative_blur * math.sqrt(statistics.mean(float(half_squared_distance(x, y).mean()) for x, y in clouds))
    exact = [reference(x, y, blur**2, cache) for x, y in clouds]
    x, y = (torch.stack(each).float() for each in zip(*clouds, strict=True))
    return Case(x, y, blur, exact) if row.batch > 1 else Case(x[0], y[0], blur, exact)


def worst_errors(solution: tuple[Any, Any, Any], exact: list[Reference]) -> Errors:
    """Largest errors of a batch of solutions, tensors or arrays; NaN if there is any."""
    value, *gradients = (part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in solution)
    values, gradients = value.reshape(-1), [part.reshape(-1, *part.shape[-2:]) for part in gradients]
    each = torch.tensor([errors(*solved) for solved in zip(values, *gradients, exact, strict=True)])
    return Errors(*each.amax(0).tolist())


def _solve(x: Tensor, y: Tensor, eps: float) -> Reference:
    cost = half_squared_distance(x, y)
    f, g, error = _cross_potentials(cost, eps)
    value, grad_x, grad_y = float(f.mean() + g.mean()), *_envelope(f, g, cost, x, y, eps)
    for points, grad in ((x, grad_x), (y, grad_y)):
        self_cost = half_squared_distance(points, points)
        f, self_error = _self_potential(self_cost, eps)
        value, error = value - float(f.mean()), max(error, self_error)
        grad -= _envelope(f, f, self_cost, points, points, eps)[0]
    return Reference(value, grad_x, grad_y, float(cost.mean()), error)


def _envelope(f: Tensor, g: Tensor, cost: Tensor, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the transport cost with respect to the points, the plan held fixed."""
    plan = torch.exp((f[:, None] + g - cost) / eps) / cost.numel()
    return plan.sum(1)[:, None] * x - plan @ y, plan.sum(0)[:, None] * y - plan.mT @ x


def _softmin(cost: Tensor, potential: Tensor, eps: float) -> Tensor:
    """Best answer on the rows to a potential on the columns."""
    return -eps * (torch.logsumexp((potential - cost) / eps, 1) - math.log(cost.shape[1]))


def _cross_potentials(cost: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """Annealed: at each temperature Gauss-Seidel iterations, then Newton's method where they are too slow."""
    g, temperature = torch.zeros_like(cost[0]), float(cost.max())
    while temperature > eps:
        temperature = max(0.5 * temperature, eps)
        for _ in range(20):
            f, image = _gauss_seidel(cost, g, temperature)
            # The marginal of the plan of f and g, over the one it should have, is exp((g - image) / temperature).
            error = float(((g - image) / temperature).clamp(max=40).expm1().abs().mean())
            g = image
            if error < COARSE_TOL:
                break
        if error >= COARSE_TOL or temperature <= eps:
            f, g, error = _newton(cost, g, temperature, COARSE_TOL if temperature > eps else TOL)
    return f, g, error


def _gauss_seidel(cost: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    f = _softmin(cost, g, eps)
    return f, _softmin(cost.mT, f, eps)


def _newton(cost: Tensor, g: Tensor, eps: float, tol: float, max_iter: int = 300) -> tuple[Tensor, Tensor, float]:
    """Newton's method on the semi-dual, damped the more the less the quadratic model is of use.

    A plan close to a matching falls into blocks that hardly exchange mass, and the curvature between them is lost to
    rounding: damping then makes it a gradient step there, a long one.
    """
    n, m = cost.shape
    identity, damping = torch.eye(m, dtype=cost.dtype, device=cost.device) / m, MIN_DAMPING
    for _ in range(max_iter):
        f = _softmin(cost, g, eps)
        conditional = torch.exp((f[:, None] + g - cost) / eps) / m
        missing = 1 / m - conditional.mean(0)
        error = float(missing.abs().sum())
        if error < tol:
            break
        # The constant direction has no curvature: the all-ones matrix fills it in.
        hessian = torch.diag(conditional.mean(0)) - conditional.mT @ conditional / n + 1 / m**2
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * identity)
        step = 0.0
        if not failed:
            direction = eps * torch.cholesky_solve(missing[:, None], factor)[:, 0]
            step, g = _line_search(cost, f, g, direction, float(missing @ direction), eps)
        damping = max(damping / 10, MIN_DAMPING) if step == 1 else 10 * damping
        if step < 0.1:
            g = _gauss_seidel(cost, g, eps)[1]
    return f, g, error


def _line_search(
    cost: Tensor, f: Tensor, g: Tensor, direction: Tensor, slope: float, eps: float
) -> tuple[float, Tensor]:
    """Longest step, of those halved from 1, that raises the semi-dual enough; none if there is none."""
    start, step = float(f.mean() + g.mean()), 1.0
    while step > 1e-9:
        there = g + step * direction
        if float(_softmin(cost, there, eps).mean() + there.mean()) >= start + 1e-4 * step * slope - ROUNDING * abs(
            start
        ):
            return step, there
        step *= 0.5
    return 0.0, g


def _self_potential(cost: Tensor, eps: float, max_iter: int = 20000) -> tuple[Tensor, float]:
    """Averaged iterations on the one potential of a cloud with itself, which at least halve the error each."""
    f = torch.zeros_like(cost[0])
    for _ in range(max_iter):
        image = _softmin(cost, f, eps)
        error = float(((f - image) / eps).clamp(max=40).expm1().abs().mean())
        f = 0.5 * (f + image)
        if error < TOL:
            break
    return f, error

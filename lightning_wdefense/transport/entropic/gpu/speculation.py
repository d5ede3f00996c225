"""Transports on a GPU without waiting for it: kernels, their check and the gradients are queued before the host reads a result.

The check is in PyTorch and as strict as that of the step-by-step solver, so a kernel that fails costs time but no accuracy: a result that
does not pass is discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.measures import Measure
from lightning_wdefense.transport.entropic import triton
from lightning_wdefense.transport.entropic.constants import NOTHING, SELF_ACCURACY, TINY
from lightning_wdefense.transport.entropic.options import SinkhornOptions
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Needed, Pair
from lightning_wdefense.transport.entropic.problem.costs import label_disagreement, too_large
from lightning_wdefense.transport.entropic.problem.problem import blur_of
from lightning_wdefense.transport.entropic.solver.dual import semi_dual
from lightning_wdefense.transport.entropic.solver.optimum import Optimum, Transports, of_weights

MARGIN = 0.9
"""Share of the tolerance that the kernels aim at, because their sums are in another order than those of the check."""


class Attempt(NamedTuple):
    """Transports that may be wrong, and what :meth:`passed` judges them by: errors and their tolerances."""

    transports: Transports
    n_iter: Tensor
    errors: list[tuple[Tensor, float]]

    def passed(self, claims: Sequence[Tensor]) -> int | None:
        """The number of iterations if no error is above its tolerance and all claims hold. Here the host waits."""
        claim = claims[0] if len(claims) == 1 else torch.stack([*claims]).all()
        errors, limits = zip(*self.errors, strict=True)
        holds, n_iter, *values = look(torch.stack([claim.float(), self.n_iter, *errors]))
        # Written so that NaN counts as large.
        good = holds == 1 and all(value <= limit for value, limit in zip(values, limits, strict=True))
        return int(n_iter) if good else None


def look(evidence: Tensor) -> list[float]:
    """The values of a vector: the one place where the host waits for the GPU."""
    values: list[float] = evidence.tolist()
    return values


def attempt(arguments: Arguments, start: Tensor | None) -> Attempt | None:
    """Transports between measures, or ``None`` if the kernels are not made for them.

    Args:
        arguments: without a cost of the caller's own.
        start: potential ``(B, M)`` to start from.
    """
    x, y, options, _, pairs, needed, weighted = arguments.detached()
    sizes = {"x": x.weights.shape[1], "y": y.weights.shape[1]}
    # Transports of one shape are a single batch.
    together = len(pairs) > 1 and sizes["x"] == sizes["y"]
    groups: list[tuple[Pair, ...]] = [tuple(pairs)] if together else [(pair,) for pair in pairs]
    if x.weights.dtype != torch.float32 or not all(_fits(group, sizes, x) for group in groups):
        return None
    centre = torch.lerp(x.points.mean(-2, keepdim=True), y.points.mean(-2, keepdim=True), 0.5)
    x, y = (measure._replace(points=measure.points - centre) for measure in (x, y))
    stacks = []
    for group in groups:
        stack = _Stack.of(group, x, y, options)
        if stack is None:
            return None
        stacks.append(stack)
    mean = stacks[0].mean(weighted=weighted)
    blur = blur_of(mean, options)
    eps = blur**options.p
    if options.label_cost is not None:
        mean = mean + options.label_cost
        stacks = [stack.with_labels(x, y, options) for stack in stacks]
    # All kernels before all checks: while they run, the host is busy with what follows them.
    temperatures = [eps.repeat(len(stack.group)) if len(stack.group) > 1 else eps for stack in stacks]
    solved = [stack.solved(each, mean, options, start) for stack, each in zip(stacks, temperatures, strict=True)]
    optima: dict[Pair, Optimum] = {}
    n_iter, errors = [], []
    for stack, each, found in zip(stacks, temperatures, solved, strict=True):
        if found is None:
            return None
        potentials, report = found
        errors += stack.check(potentials, each, options, needed, optima, weighted=weighted)
        if stack.between > 0:
            n_iter.append(report[: stack.between, 1].max())
    return Attempt(Transports(optima, blur), n_iter[0], errors)


class _Stack(NamedTuple):
    """Transports of one shape as a batch ``(S, N, M)``: first those between the measures, then those within them."""

    group: tuple[Pair, ...]
    size: int
    """Problems of each pair."""
    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    cost: Tensor
    distances: Tensor
    """The cost without the price of labels, by which the gradient of a distance divides."""

    @classmethod
    def of(cls, group: tuple[Pair, ...], x: Measure, y: Measure, options: SinkhornOptions) -> _Stack | None:
        measures = {"x": x, "y": y}
        points_x, points_y, a, b = (
            _stacked([getattr(measures[pair[side]], field) for pair in group])
            for field in ("points", "weights")
            for side in (0, 1)
        )
        cost = triton.pairwise_costs(points_x, points_y, options.p)
        return None if cost is None else cls(group, x.weights.shape[0], points_x, points_y, a, b, cost, cost)

    @property
    def between(self) -> int:
        """How many transports are not of a measure to itself."""
        return self.size if self.group[0] == "xy" else 0

    def mean(self, *, weighted: bool) -> Tensor:
        """Mean cost ``(B,)`` between the measures."""
        if not weighted:
            return self.cost[: self.size].mean((-2, -1))
        a, b = self.a[: self.size], self.b[: self.size]
        total = ((self.cost[: self.size] @ b.unsqueeze(-1)).squeeze(-1) * a).sum(-1)
        return total / (a.sum(-1) * b.sum(-1))

    def with_labels(self, x: Measure, y: Measure, options: SinkhornOptions) -> _Stack:
        """The same with the price of labels in its cost."""
        distances = self.cost.clone() if options.p == 1 else self.cost
        labels = {"x": x.labels, "y": y.labels}
        for i, pair in enumerate(self.group):
            one, other = labels[pair[0]], labels[pair[1]]
            if one is not None and other is not None:
                part = self.cost[i * self.size : (i + 1) * self.size]
                part.add_(label_disagreement(one, other, part.dtype), alpha=options.label_cost or 0.0)
        return self._replace(distances=distances)

    def solved(
        self, eps: Tensor, mean: Tensor, options: SinkhornOptions, start: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """What the kernels find: potentials ``(S, M)``, and their report."""
        return triton.potentials(
            *(self.cost, self.a, self.b, eps, options.rho, mean),
            tol=MARGIN * options.tol,
            self_tol=MARGIN * SELF_ACCURACY * options.tol,
            max_iter=options.max_iter,
            start=start,
            between=self.between,
        )

    def check(
        self,
        g: Tensor,
        temperatures: Tensor,
        options: SinkhornOptions,
        needed: Needed,
        optima: dict[Pair, Optimum],
        *,
        weighted: bool,
    ) -> list[tuple[Tensor, float]]:
        """Add the optima with potentials ``g`` to others; return how far off they are, with what is allowed.

        As in :class:`~lightning_wdefense.transport.entropic.solver.kernel.GibbsKernel`, with all of the kernel at once.
        """
        a, b, k, rho = self.a, self.b, self.between, options.rho
        total = self.size * len(self.group)
        eps = temperatures.unsqueeze(-1)
        scale = -eps if rho is None else eps * (-rho / (rho + eps))
        exponents = torch.addcdiv(b.log(), g, eps).unsqueeze(-2)
        kernel = torch.addcdiv(exponents, self.cost, eps.unsqueeze(-1), value=-1)
        top = kernel.amax(-1)
        kernel.sub_(top.unsqueeze(-1)).exp_()
        sums = kernel.sum(-1)
        f = (top + sums.log()) * scale

        # Within a measure both sides have one potential, between them the rows have the exact answer to the columns.
        own = torch.where(a[k:] > 0, g[k:], f[k:]) if weighted and k < total else g[k:]
        scalings = []
        if k > 0:
            # Of what cancels in the exponent nothing is left: large numbers would leave their rounding.
            scalings.append(a[:k] / sums[:k] if rho is None else a[:k] * (-f[:k] / rho).exp() / sums[:k])
        if k < total:
            scalings.append(torch.addcdiv(top[k:], own, eps[k:]).exp_().mul_(a[k:]))
        u = _stacked(scalings)
        columns = torch.bmm(u.unsqueeze(-2), kernel).squeeze(-2)
        errors = _marginal_errors(columns, g, b, rho, weighted=weighted)
        if weighted:
            g = _stacked([*([self._columns(f, g, eps, scale)] if k > 0 else []), *([own] if k < total else [])])
        values = semi_dual(f, g, a, b, temperatures, rho).to(a.dtype)

        of_x = of_y = of_a = of_b = None
        if any(needed.of(pair).x for pair in self.group) or (k > 0 and needed.y):
            of_x, of_y = self._displacements(kernel, u, sums, columns, needed, options.p)
        if any(needed.of(pair).a for pair in self.group):
            rows = [*([f[:k]] if k > 0 else []), *([own] if k < total else [])]
            of_a = of_weights(_stacked(rows), b, eps, rho)
        if k > 0 and needed.b:
            of_b = of_weights(g[:k], a[:k], eps[:k], rho)
        for i, pair in enumerate(self.group):
            part, wanted = slice(i * self.size, (i + 1) * self.size), needed.of(pair)
            optima[pair] = Optimum(
                value=values[part],
                f=f[part],
                g=g[part],
                n_iter=0,
                error=errors[part],
                of_x=of_x[part] if of_x is not None and wanted.x else None,
                of_y=of_y if pair == "xy" else None,
                of_a=of_a[part] if of_a is not None and wanted.a else None,
                of_b=of_b if pair == "xy" else None,
                of_cost=None,
            )
        allowed = (slice(0, k), options.tol), (slice(k, total), SELF_ACCURACY * options.tol)
        return [(errors[part].max(), tol) for part, tol in allowed if part.start < part.stop]

    def _columns(self, f: Tensor, g: Tensor, eps: Tensor, scale: Tensor) -> Tensor:
        """The potential of the columns of the transports between, where they have no weight the exact answer to the rows."""
        k = self.between
        exponents = torch.addcdiv(self.a[:k].log(), f[:k], eps[:k]).unsqueeze(-1)
        answer = torch.addcdiv(exponents, self.cost[:k], eps[:k].unsqueeze(-1), value=-1).logsumexp(-2) * scale[:k]
        return torch.where(self.b[:k] > 0, g[:k], answer)

    def _displacements(
        self, kernel: Tensor, u: Tensor, sums: Tensor, columns: Tensor, needed: Needed, p: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the points of the rows ``(S, N, D)``, and in those of the columns of the transports between."""
        k, scale = self.between, u.unsqueeze(-1)
        if p == 1:
            kernel = torch.where(self.distances > 0, kernel / self.distances, 0)
            sums, columns = kernel.sum(-1), torch.bmm(u.unsqueeze(-2), kernel).squeeze(-2)
        of_x = of_y = None
        if any(needed.of(pair).x for pair in self.group):
            of_x = torch.baddbmm(sums.unsqueeze(-1) * self.x, kernel, self.y, alpha=-1).mul_(scale)
        if k > 0 and needed.y:
            scaled = scale[:k] * self.x[:k]
            of_y = torch.baddbmm(columns[:k].unsqueeze(-1) * self.y[:k], kernel[:k].mT, scaled, alpha=-1)
        return of_x, of_y


def _fits(group: tuple[Pair, ...], sizes: dict[str, int], like: Measure) -> bool:
    """Whether the kernels can hold all transports of a group at once."""
    n, m = (sizes[side] for side in group[0])
    size, device = like.weights.shape[0], like.weights.device
    within = size * (len(group) - (group[0] == "xy"))
    fits = group[0] != "xy" or triton.fits(n, m, size, device)
    fits = fits and (within == 0 or triton.fits(n, n, within, device))
    return fits and not too_large((size * len(group), n, m), like.weights)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _marginal_errors(columns: Tensor, g: Tensor, b: Tensor, rho: float | None, *, weighted: bool) -> Tensor:
    """As in :class:`~lightning_wdefense.transport.entropic.solver.iteration.Iteration`."""
    root, target = b.sqrt(), b
    mass = norm = torch.linalg.vector_norm(root, dim=-1)
    if rho is not None:
        root = root * (g * (-0.5 / rho)).exp().clamp(min=TINY**0.5)
        target = root.square()
        norm = torch.maximum(torch.linalg.vector_norm(root, dim=-1), NOTHING * mass)
    off = (columns - target) / (root.clamp(min=TINY**0.5) if weighted else root)
    return torch.linalg.vector_norm(off, dim=-1) / norm

"""Transports on a GPU without waiting for it: kernels, their check and the gradients are queued before anything is looked at.

The check is in PyTorch and as strict as that of the careful way, so that a kernel that fails costs time but no accuracy: what does
not pass is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport import triton
from lightning_wdefense.transport.costs import label_disagreement, too_large
from lightning_wdefense.transport.dual import semi_dual
from lightning_wdefense.transport.iteration import NOTHING, TINY
from lightning_wdefense.transport.measures import Measure
from lightning_wdefense.transport.optimum import Needed, Optimum, of_weights
from lightning_wdefense.transport.options import SinkhornOptions
from lightning_wdefense.transport.problem import Pair, blur_of
from lightning_wdefense.transport.symmetric import SELF_ACCURACY

MARGIN = 0.9
"""Share of the tolerance that the kernels are asked for: their sums are in another order than those of the check."""


class Attempt(NamedTuple):
    """Transports that may be wrong, the blur ``(B,)``, and what :func:`passed` judges them by."""

    optima: dict[Pair, Optimum]
    blur: Tensor
    evidence: list[Tensor]

    def passed(self, claims: Sequence[Tensor]) -> int | None:
        """The number of iterations if all errors are below the tolerance and all claims hold. Here the host waits."""
        holds, n_iter, *errors = look(torch.stack([torch.stack([*claims]).all().float(), *self.evidence]))
        # Written so that NaN counts as large.
        return int(n_iter) if holds == 1 and all(error <= 1 for error in errors) else None


def look(evidence: Tensor) -> list[float]:
    """The values of a vector: the one place where the host waits for the GPU."""
    values: list[float] = evidence.tolist()
    return values


def attempt(
    x: Measure,
    y: Measure,
    options: SinkhornOptions,
    pairs: Sequence[Pair],
    needed: Needed,
    start: Tensor | None,
    *,
    padded: bool,
) -> Attempt | None:
    """Transports between measures, or ``None`` if the kernels are not made for them.

    Args:
        x: the one measure.
        y: the other one.
        options: the settings; the cost is not the caller's own.
        pairs: which transports.
        needed: gradients that somebody will ask for.
        start: potential ``(B, M)`` to start from.
        padded: whether there may be points of weight zero.
    """
    sizes = {"x": x.weights.shape[1], "y": y.weights.shape[1]}
    # Transports of one shape are a single batch.
    together = len(pairs) > 1 and sizes["x"] == sizes["y"]
    groups: list[tuple[Pair, ...]] = [tuple(pairs)] if together else [(pair,) for pair in pairs]
    if x.weights.dtype != torch.float32 or not all(_fits(group, sizes, x) for group in groups):
        return None
    x, y = x.detached(), y.detached()
    centre = torch.lerp(x.points.mean(-2, keepdim=True), y.points.mean(-2, keepdim=True), 0.5)
    x, y = (measure._replace(points=measure.points - centre) for measure in (x, y))
    stacks = []
    for group in groups:
        stack = _Stack.of(group, x, y, options)
        if stack is None:
            return None
        stacks.append(stack)
    mean = stacks[0].mean()
    blur, mean = blur_of(mean, options), mean + (options.label_cost or 0.0)
    if options.label_cost is not None:
        stacks = [stack.with_labels(x, y, options) for stack in stacks]
    # All kernels before all checks: while they run, the host is busy with what follows them.
    solved = [stack.solved(blur, mean, options, start) for stack in stacks]
    optima: dict[Pair, Optimum] = {}
    evidence = []
    for stack, found in zip(stacks, solved, strict=True):
        if found is None:
            return None
        evidence += stack.check(*found, blur, options, needed, optima, padded=padded)
    return Attempt(optima, blur, evidence)


class _Stack(NamedTuple):
    """Transports of one shape as a batch ``(S, N, M)``: first those between the measures, then those within them."""

    group: tuple[Pair, ...]
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
        return None if cost is None else cls(group, points_x, points_y, a, b, cost, cost)

    @property
    def size(self) -> int:
        """Problems of each pair."""
        return len(self.a) // len(self.group)

    @property
    def between(self) -> int:
        """How many transports are not of a measure to itself."""
        return self.size if self.group[0] == "xy" else 0

    def mean(self) -> Tensor:
        """Mean cost ``(B,)`` between the measures."""
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
        self, blur: Tensor, mean: Tensor, options: SinkhornOptions, start: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """What the kernels find: potentials ``(S, M)``, and their report."""
        return triton.potentials(
            *(self.cost, self.a, self.b, self._temperatures(blur, options), options.rho, mean),
            tol=MARGIN * options.tol,
            self_tol=MARGIN * SELF_ACCURACY * options.tol,
            max_iter=options.max_iter,
            start=start,
            between=self.between,
        )

    def check(
        self,
        g: Tensor,
        report: Tensor,
        blur: Tensor,
        options: SinkhornOptions,
        needed: Needed,
        optima: dict[Pair, Optimum],
        *,
        padded: bool,
    ) -> list[Tensor]:
        """Add the optima with potentials ``g`` to others; return how far off they are, in units of what is allowed.

        As in :class:`~lightning_wdefense.transport.kernel.GibbsKernel`, with all of the kernel at once.
        """
        a, b, k, rho = self.a, self.b, self.between, options.rho
        temperatures = self._temperatures(blur, options)
        eps = temperatures.unsqueeze(-1)
        share = None if rho is None else rho / (rho + eps)
        kernel = torch.addcdiv((b.log() + g / eps).unsqueeze(-2), self.cost, eps.unsqueeze(-1), value=-1)
        top = kernel.amax(-1)
        kernel.sub_(top.unsqueeze(-1)).exp_()
        sums = kernel.sum(-1)
        log_sums = sums.log()
        f = (top + log_sums) * -(eps if share is None else eps * share)

        # Within a measure both sides have one potential, between them the rows have the exact answer to the columns.
        rows, scalings = [], []
        if k > 0:
            rows.append(f[:k])
            if share is None:
                scalings.append(a[:k] / sums[:k])
            else:
                scalings.append(a[:k] * ((1 - share[:k]) * top[:k] - share[:k] * log_sums[:k]).exp())
        if k < len(a):
            rows.append(torch.where(a[k:] > 0, g[k:], f[k:]))
            scalings.append(a[k:] * (rows[-1] / eps[k:] + top[k:]).exp())
        row_potential, u = _stacked(rows), _stacked(scalings)
        columns = torch.bmm(u.unsqueeze(-2), kernel).squeeze(-2)
        errors = _marginal_errors(columns, g, b, rho)

        if padded:
            answers = [row_potential[k:]] if k < len(a) else []
            if k > 0:
                exponents = (a[:k].log() + f[:k] / eps[:k]).unsqueeze(-1) - self.cost[:k] / eps[:k].unsqueeze(-1)
                answer = exponents.logsumexp(-2) * -(eps[:k] if share is None else eps[:k] * share[:k])
                answers.insert(0, torch.where(b[:k] > 0, g[:k], answer))
            g = _stacked(answers)
        values = semi_dual(f, g, a, b, temperatures, rho).to(a.dtype)
        of_x = of_y = None
        if any(needed.of(pair).x for pair in self.group) or (k > 0 and needed.y):
            of_x, of_y = self._displacements(kernel, u, sums, columns, needed, options.p)
        of_a = of_weights(row_potential, b, eps, rho) if any(needed.of(pair).a for pair in self.group) else None
        of_b = of_weights(g[:k], a[:k], eps[:k], rho) if k > 0 and needed.b else None

        for i, pair in enumerate(self.group):
            part, own = slice(i * self.size, (i + 1) * self.size), needed.of(pair)
            optima[pair] = Optimum(
                value=values[part],
                f=f[part],
                g=g[part],
                n_iter=0,
                error=errors[part],
                of_x=of_x[part] if of_x is not None and own.x else None,
                of_y=of_y if pair == "xy" else None,
                of_a=of_a[part] if of_a is not None and own.a else None,
                of_b=of_b if pair == "xy" else None,
                of_cost=None,
            )
        evidence = []
        if k > 0:
            evidence += [report[:k, 1].max(), errors[:k].max() / options.tol]
        if k < len(a):
            evidence.append(errors[k:].max() / (SELF_ACCURACY * options.tol))
        return evidence

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

    def _temperatures(self, blur: Tensor, options: SinkhornOptions) -> Tensor:
        return (blur**options.p).repeat(len(self.group))


def _fits(group: tuple[Pair, ...], sizes: dict[str, int], like: Measure) -> bool:
    """Whether the kernels can hold all transports of a group at once."""
    n, m = (sizes[side] for side in group[0])
    size, device = len(like.weights), like.weights.device
    within = size * (len(group) - (group[0] == "xy"))
    fits = group[0] != "xy" or triton.fits(n, m, size, device)
    return fits and (within == 0 or triton.fits(n, n, within, device)) and not too_large(n, m, device)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _marginal_errors(columns: Tensor, g: Tensor, b: Tensor, rho: float | None) -> Tensor:
    """As in :class:`~lightning_wdefense.transport.iteration.Iteration`."""
    root, target = b.sqrt(), b
    least = NOTHING * torch.linalg.vector_norm(root, dim=-1)
    if rho is not None:
        root = root * (g * (-0.5 / rho)).exp().clamp(min=TINY**0.5)
        target = root.square()
    off = (columns - target) / root.clamp(min=TINY**0.5)
    return torch.linalg.vector_norm(off, dim=-1) / torch.maximum(torch.linalg.vector_norm(root, dim=-1), least)

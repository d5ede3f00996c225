"""Solves Sinkhorn problems whose rows are shared among ranks, and the same alone; run by test_sharing.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from support.processes import group_ends

from lightning_wdefense._ranks import Ranks, rows_of
from lightning_wdefense.transport import sharing, sinkhorn, sinkhorn_divergence
from lightning_wdefense.transport.entropic.newton import problem as newton
from lightning_wdefense.transport.entropic.problem import costs
from lightning_wdefense.transport.entropic.solver import kernel

SIZES = {2: [30, 10], 3: [13, 0, 27]}
OPTIONS = {
    "plain": {},
    "small blur": {"relative_blur": 0.05},
    "unbalanced": {"reach": 1.0},
    "labels": {"label_cost": 5.0},
    "soft labels": {"label_cost": 5.0},
    "weights": {},
    "float32": {},
    "streamed": {},
}
NOT_SHARED = {"distance": {"p": 1}, "own cost": {"cost": lambda x, y: (x[:, None] - y).abs().sum(-1)}}


def problem(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    y = torch.randn(40, 6, generator=generator) + 0.5
    labels = torch.randint(3, (40,), generator=generator)
    weights = None
    if name == "weights":
        weights = torch.rand(40, generator=generator)
        weights[[3, 20, 39]] = 0  # padding, on several ranks
        weights = weights / weights.sum()
    if name == "soft labels":
        labels = torch.nn.functional.one_hot(labels, 3) * 0.8 + 0.2 / 3
    if name != "float32":  # in which the order of sums shows
        x, y, labels = x.double(), y.double(), labels.double() if labels.is_floating_point() else labels
        weights = None if weights is None else weights.double()
    return x, y, weights, labels


def solve(name, options):
    x, y, weights, labels = problem(name)
    x.requires_grad_()
    y.requires_grad_()
    options = {**options, "x_labels": labels, "y_labels": labels}
    value = sinkhorn_divergence(x, y, weights, weights, **options)
    gradients = torch.autograd.grad(value, (x, y))
    solution = sinkhorn(x, y, weights, weights, **options)
    return {
        "value": value.detach(),
        "x": gradients[0],
        "y": gradients[1],
        "f": solution.f.detach(),
        "g": solution.g.detach(),
        "n_iter": solution.n_iter,
        "error": solution.marginal_error.detach(),
    }


def main(folder):
    dist.init_process_group("gloo")
    newton.suits = lambda *shape: False  # alone, so small a problem would not be solved by the same iteration
    ranks = Ranks.current()
    sizes = SIZES[ranks.size]
    results = {}
    for name, options in {**OPTIONS, **NOT_SHARED}.items():
        costs.STORED["cpu"] = 100 if name == "streamed" else 2**28
        kernel.STREAMED["cpu"] = 320 if name == "streamed" else 2**18
        sharing.SHARED = 2**40
        alone = solve(name, options)
        sharing.SHARED = 1
        sums, counted = Ranks.sum, []
        Ranks.sum = lambda self, tensor, sums=sums, counted=counted: counted.append(1) or sums(self, tensor)
        try:
            with sharing.rows_shared(ranks, sizes):
                shared = solve(name, options)
        finally:
            Ranks.sum = sums
        results[name] = {"alone": alone, "shared": shared, "messages": len(counted)}
    results["own"] = [rows_of(ranks.rank, sizes).start, rows_of(ranks.rank, sizes).stop]
    torch.save(results, f"{folder}/{ranks.rank}.pt")


if __name__ == "__main__":
    with group_ends():
        main(sys.argv[1])

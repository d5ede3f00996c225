"""Local transport plans written out as sparse programs, for solvers that share nothing with ours."""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack
from torch import Tensor

from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport, square


@dataclass(frozen=True)
class Program:
    """All that a plan of one image ``(C, H, W)`` may be: one variable for each pixel with mass and each of its neighbours.

    Attributes:
        place: of each variable's entry in a plan ``(K, R)``: neighbour and row, ``(2, M)``.
        target: the pixel at which its mass arrives.
        cost: of a unit.
        leaves: the matrix from plans to the mass that leaves each row.
        arrives: the matrix from plans to images.
    """

    place: np.ndarray
    target: np.ndarray
    cost: np.ndarray
    leaves: csr_array
    arrives: csr_array
    masses: np.ndarray
    budget: float
    capacity: np.ndarray | None

    @classmethod
    def of(cls, image: Tensor, budget: float, capacity: float | None, size: int, p: int) -> Program:
        height, width = image.shape[1:]
        flat, reach = image.flatten().tolist(), size // 2
        rows, place, target, cost, row = [i for i, value in enumerate(flat) if value > 0], [], [], [], []
        for number, pixel in enumerate(rows):
            channel, i, j = pixel // (height * width), pixel // width % height, pixel % width
            for a in range(max(i - reach, 0), min(i + reach + 1, height)):
                for b in range(max(j - reach, 0), min(j + reach + 1, width)):
                    place.append(((a - i + reach) * size + b - j + reach, number))
                    target.append((channel * height + a) * width + b)
                    cost.append(((a - i) ** 2 + (b - j) ** 2) ** (p / 2))
                    row.append(number)
        ones, variables = np.ones(len(row)), np.arange(len(row))
        return cls(
            np.array(place).T,
            np.array(target),
            np.array(cost),
            csr_array((ones, (row, variables)), shape=(len(rows), len(row))),
            csr_array((ones, (target, variables)), shape=(len(flat), len(row))),
            np.array([flat[pixel] for pixel in rows]),
            budget,
            None if capacity is None else np.full(len(flat), capacity),
        )

    def most(self, values: Tensor) -> float:
        """The largest value that a plan can bring together, by HiGHS."""
        limits, right = csr_array(self.cost[None]), [self.budget]
        if self.capacity is not None:
            limits, right = vstack([limits, self.arrives]), [self.budget, *self.capacity]
        solution = linprog(
            -values.flatten().numpy()[self.target], limits, right, self.leaves, self.masses, method="highs"
        )
        assert solution.status == 0, solution.message
        return -solution.fun

    def nearest(self, goal: Tensor) -> np.ndarray:
        """The variables of the plan nearest to ``goal`` ``(K, R)``, by Clarabel."""
        plan = cp.Variable(len(self.cost), nonneg=True)
        constraints = [self.leaves @ plan == self.masses, self.cost @ plan <= self.budget]
        if self.capacity is not None:
            constraints.append(self.arrives @ plan <= self.capacity)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(plan - self.variables(goal))), constraints)
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        assert problem.status == cp.OPTIMAL
        return plan.value

    def variables(self, plan: Tensor) -> np.ndarray:
        """The entries of a plan ``(K, R)`` that are variables."""
        return plan.numpy()[tuple(self.place)]

    def assert_plan(self, plan: Tensor, *, box: bool, tol: float = 1e-9) -> None:
        """That a plan ``(K, R)`` holds its constraints, with or without the room in the pixels."""
        own = self.variables(plan)
        rest = plan.numpy().copy()
        rest[tuple(self.place)] = 0
        assert not rest.any(), "mass left the image, or came from a row without any"
        assert own.min() >= -tol
        np.testing.assert_allclose(self.leaves @ own, self.masses, atol=tol)
        assert self.cost @ own <= self.budget * (1 + tol) + tol
        if box and self.capacity is not None:
            assert (self.arrives @ own - self.capacity).max() <= tol


def transport_of(
    images: Tensor, share: float | Tensor, size: int = 5, p: int = 1, capacity: float | None = 1.0
) -> LocalTransport:
    """Of images ``(N, C, H, W)``, with a budget of this share of their mass."""
    budget = share * images.sum((1, 2, 3))
    limit = None if capacity is None else torch.full_like(images, capacity)
    return LocalTransport.of(images, budget, limit, square(size, p))


def programs_of(transport: LocalTransport, images: Tensor, p: int = 1) -> list[Program]:
    """The same for the solvers, image by image."""
    capacity = None if transport.capacity is None else float(transport.capacity[0, 0])
    return [
        Program.of(image, float(budget), capacity, transport.neighbourhood.size, p)
        for image, budget in zip(images, transport.budget, strict=True)
    ]

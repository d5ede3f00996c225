"""Checks of the Triton kernels: in their interpreter, or on a GPU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from lightning_wdefense.transport.entropic.problem.costs import matrix_cost
from lightning_wdefense.transport.entropic.problem.workspace import Workspace
from lightning_wdefense.transport.entropic.solver import potentials as solver
from lightning_wdefense.transport.entropic.solver.dual import semi_dual
from lightning_wdefense.transport.entropic.solver.kernel import GibbsKernel
from lightning_wdefense.transport.entropic.triton import potential

TOL = 1e-3


@dataclass(frozen=True)
class Case:
    """A transport problem, or a batch of them, and how it is to be solved."""

    n: int = 30
    m: int = 30
    batch: tuple[int, ...] = ()
    blur: float = 0.2
    """In units of the typical distance, and half as large in each further problem of a batch."""
    weights: str = "uniform"
    mass: float = 1.0
    rho: float | None = None
    start: str | None = None
    tol: float = TOL
    distance: float = 0.5
    """Between the two clouds, or, for ``weights="groups"``, between the two halves of each."""

    def weigh(self, size: int, rng: torch.Generator) -> Tensor:
        weights = torch.ones(*self.batch, size)
        if self.weights != "uniform":
            weights = 0.1 + torch.rand(*self.batch, size, generator=rng)
        if self.weights == "zeros":
            weights[..., 3::5] = 0
        return self.mass * weights / weights.sum(-1, keepdim=True)

    def problem(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Cost, weights, temperatures and mean costs, on the CPU."""
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(*self.batch, self.n, 3, generator=rng)
        y = 0.8 * torch.randn(*self.batch, self.m, 3, generator=rng)
        if self.weights == "groups":
            x[..., : self.n // 3, 0] += self.distance
            y[..., : self.m // 2, 0] += self.distance
        else:
            y = y + self.distance
        a, b = self.weigh(self.n, rng), self.weigh(self.m, rng)
        cost = 0.5 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        mean = ((cost @ b.unsqueeze(-1)).squeeze(-1) * a).sum(-1) / self.mass**2
        blur = self.blur * 0.5 ** torch.arange(math.prod(self.batch)).reshape(self.batch)
        return cost, a, b, blur.square() * mean, mean


SOLVES = {
    "uniform": Case(),
    "weighted": Case(weights="random", mass=3.0),
    "zero weights": Case(weights="zeros"),
    "rectangular": Case(n=19, m=37, weights="random"),
    "one row": Case(n=1, m=5),
    "one column": Case(n=5, m=1),
    "accurate": Case(tol=3e-5),
    "small blur": Case(n=20, m=20, blur=0.05),
    "far groups": Case(n=21, m=20, weights="groups", distance=12.0),
    "unbalanced": Case(n=25, m=20, weights="zeros", rho=1.0),
    "unbalanced, cheap": Case(rho=0.05, mass=2.0),
    "batch": Case(n=12, m=17, batch=(3,), weights="zeros"),
    "unbalanced batch": Case(n=12, m=17, batch=(3,), rho=2.0),
    "batch of two": Case(n=6, m=9, batch=(2,), blur=0.8, weights="random"),
    "near start": Case(start="near"),
    "poor start": Case(start="poor"),
    "several hundred": Case(n=140, m=150, weights="zeros"),
}
"""Small enough for the interpreter."""

LARGE_SOLVES = {
    "64": Case(n=64, m=64, batch=(16,), blur=0.1),
    "128": Case(n=128, m=128, blur=0.05),
    "batch of 300": Case(n=300, m=257, batch=(5,), weights="zeros"),
    "1000": Case(n=1000, m=1000, weights="random"),
    "1000, small blur": Case(n=1000, m=1000, blur=0.05),
    "1000, unbalanced": Case(n=1000, m=900, rho=1.0),
    "2048": Case(n=2000, m=2048),
}
"""For a GPU, with several programs for each problem of more than 128 points."""


def dual_value_and_error(
    cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, rho: float | None, g: Tensor
) -> tuple[Tensor, Tensor]:
    """What potentials are worth and the error of their column marginal, by the dense formulas in float64."""
    cost, a, b, eps, g = (each.double() for each in (cost, a, b, eps, g))
    e, share = eps.unsqueeze(-1), 1.0 if rho is None else (rho / (rho + eps)).unsqueeze(-1)
    f = -e * share * (b.log().unsqueeze(-2) + (g.unsqueeze(-2) - cost) / e.unsqueeze(-1)).logsumexp(-1)
    plan = a.unsqueeze(-1) * b.unsqueeze(-2) * ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / e.unsqueeze(-1)).exp()
    target = b if rho is None else b * (-g / rho).exp()
    gap = torch.where(b > 0, (plan.sum(-2) - target) / target.sqrt(), 0)
    return semi_dual(f, g, a, b, eps, rho), torch.linalg.vector_norm(gap, dim=-1) / target.sum(-1).sqrt()


def check_solve(name: str, case: Case, device: str = "cpu") -> str:
    """The kernel's potentials have the marginal, and the value that the PyTorch solver finds in float64."""
    cost, a, b, eps, mean = problem = case.problem()
    cost, a, b, eps, mean = (each.to(device) for each in problem)
    temperature, average = (each.unsqueeze(-1) if case.batch else float(each) for each in (eps, mean))
    settings = (temperature, case.rho, average, case.tol)
    start, max_iter = None, 1000
    reference = solver.solve(
        GibbsKernel(matrix_cost(cost.double()), a.double(), b.double(), case.rho, Workspace()),
        temperature.double() if isinstance(temperature, Tensor) else temperature,
        mean=average.double() if isinstance(average, Tensor) else average,
        tol=1e-6,
        max_iter=3000,
    )
    if case.start == "near":
        assert dual_value_and_error(cost, a, b, eps, None, potential(cost, a, b, *settings, 6))[1] > case.tol
        start, max_iter = reference.g.float() + 0.02 * float(eps) * torch.sin(torch.arange(case.m, device=device)), 6
    elif case.start == "poor":
        start = 50 * torch.sin(torch.arange(case.m, device=device))
    began = time.perf_counter()
    g = potential(cost, a, b, *settings, max_iter, start)
    seconds = time.perf_counter() - began
    assert g is not None, name
    assert g.shape == b.shape
    assert g.dtype == torch.float32
    value, error = dual_value_and_error(cost, a, b, eps, case.rho, g)
    best, _ = dual_value_and_error(cost, a, b, eps, case.rho, reference.g)
    assert bool((error <= 1.05 * case.tol + 1e-5).all()), (name, error)
    torch.testing.assert_close(value, best, rtol=1e-3, atol=1e-6)
    return f"{name}: error {float(error.max()):.1e}, value off by {float((value / best - 1).abs().max()):.0e}, {seconds:.1f} s"


STREAMS = {"a row of tiles": (5, 130, 3), "one tile": (64, 64, 16), "uneven": (70, 66, 21)}
LARGE_STREAMS = {"large": (5000, 7001, 100), "wide": (300, 400, 1000)}


def check_stream(name: str, n: int, m: int, depth: int, device: str = "cpu") -> str:
    """Streaming sums and averages are those of the dense matrix, also where weights are zero."""
    from lightning_wdefense.transport.entropic.triton import streaming

    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, depth, generator=rng).div(depth**0.5).to(device) for size in (n, m))
    exponents = torch.randn(m, generator=rng).to(device)
    exponents[: m // 2 + 1] = -math.inf  # a whole tile
    eps = 0.05
    sums = streaming.log_sums(x, y, exponents, eps)
    averages = streaming.weighted_points(x, y, exponents, sums, eps)
    scores = exponents.double() - 0.5 * torch.cdist(x.double(), y.double()).square() / eps
    torch.testing.assert_close(sums.double(), scores.logsumexp(1), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(averages.double(), scores.softmax(1) @ y.double(), rtol=1e-4, atol=2e-5)
    nothing = torch.full_like(exponents, -math.inf)
    assert bool((streaming.log_sums(x, y, nothing, eps) == -math.inf).all())
    assert bool((streaming.weighted_points(x, y, nothing, nothing[:1].expand(n), eps) == 0).all())
    return f"{name}: off by {float((sums - scores.logsumexp(1)).abs().max()):.0e}"


ENDS = {
    "p2": {},
    "weighted": {"a": torch.arange(20.0) / 190, "b": torch.arange(17.0) / 136},
    "reach": {"reach": 1.0},
    "labels": {"label_cost": 1.0, "x_labels": torch.arange(20) % 3, "y_labels": torch.arange(17) % 3},
    "p1": {"p": 1},
    "batch": {},
    "large blur": {"relative_blur": 0.7},
}


def check_end_to_end(name: str, device: str = "cpu") -> str:
    """The public function with kernels, stored and streamed, against itself in float64, which has none.

    Without speculation, so that PyTorch goes on from what the kernels find.
    """
    from lightning_wdefense.transport import sinkhorn, sinkhorn_divergence
    from lightning_wdefense.transport.entropic import evaluation
    from lightning_wdefense.transport.entropic.newton import problem as small
    from lightning_wdefense.transport.entropic.problem import costs

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), 0.8 * torch.randn(17, 3, generator=generator) + 0.5
    if name == "batch":
        x, y = torch.stack([x, 3 * x]), torch.stack([y, y])
    options = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in ENDS[name].items()}

    def evaluate(dtype: torch.dtype, **settings: float) -> tuple[torch.Tensor, torch.Tensor, int]:
        clouds = [cloud.to(device, dtype).requires_grad_() for cloud in (x, y)]
        value = sinkhorn_divergence(*clouds, **settings, **options).sum()
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(value, clouds)])
        with torch.no_grad():
            n_iter = sinkhorn(*clouds, **settings, **options).n_iter
        return value.detach().double(), gradient.double(), n_iter

    exact, exact_gradient, _ = evaluate(torch.float64, tol=1e-8)
    results, kept, few = [], costs.STORED[device], small.FEW
    for stored in (kept, 0):
        costs.STORED[device], small.FEW = stored, 0  # On a CPU it would be too small for a kernel.
        try:
            with mock.patch.object(evaluation, "attempt_again", return_value=None):
                value, gradient, n_iter = evaluate(torch.float32)
        finally:
            costs.STORED[device], small.FEW = kept, few
        assert abs(value - exact) < 1e-3 * abs(exact), (name, stored, value, exact)
        assert (gradient - exact_gradient).norm() < 1e-2 * exact_gradient.norm(), (name, stored)
        results.append(n_iter)
    assert results[0] <= 3, f"{name}: PyTorch had {results[0]} iterations left to do after the kernel"
    return f"{name}: {results[0]} iterations after the kernel, {results[1]} with a streamed cost"


def check_programs(programs: int) -> str:
    """Several programs, each in a process of its own, solve a problem together. To import takes longer, so they are forks."""
    import torch.multiprocessing as mp

    from lightning_wdefense.transport.entropic.triton.persistent import MeetingPlace, Slabs, meeting_place

    case = Case(n=21, m=27, weights="zeros", blur=0.6)
    cost, a, b, eps, mean = case.problem()
    slabs = Slabs(programs, 16 if programs == 2 else 8, 32)
    place = MeetingPlace(*(each.share_memory_() for each in meeting_place(1, slabs, cost.device)))
    context = mp.get_context("fork")
    answers = context.Queue()
    arguments = (cost[None], a[None], b[None], eps[None], math.inf, mean[None], case.tol, 500, None, slabs)
    processes = [
        context.Process(target=_program, args=(own, place, arguments, answers), daemon=True) for own in range(programs)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    _, error = dual_value_and_error(cost, a, b, eps, None, torch.tensor(found[0][0]))
    assert float(error) <= 1.05 * case.tol, error
    assert int(place.arrived) == programs * 2 * found[0][1], "they must meet twice in an iteration, all of them"
    return f"{programs} programs: error {float(error):.1e}, {found[0][1]} iterations"


def _program(own: int, place: tuple, arguments: tuple, answers: object) -> None:
    """Run one program of the grid: the interpreter by itself runs them one after the other, so that they never meet."""
    from triton.runtime import interpreter

    from lightning_wdefense.transport.entropic.triton import small

    class Alone:
        def __getitem__(self, grid: tuple) -> object:
            return kernel[(1,)]

    torch.set_num_threads(1)
    kernel, builder = small.sinkhorn, interpreter.interpreter_builder
    set_index, set_size, programs = builder.set_grid_idx, builder.set_grid_dim, arguments[-1].programs
    builder.set_grid_idx = lambda x, y, z: set_index(own, y, z)
    builder.set_grid_dim = lambda x, y, z: set_size(programs, y, z)
    small.sinkhorn, small.meeting_place = Alone(), lambda *_: place
    g, report = small.solve(*arguments)
    answers.put((own, (g[0].tolist(), int(report[0, 1]) if own == 0 else None)))

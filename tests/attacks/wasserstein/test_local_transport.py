"""The parts of the Wasserstein attack against HiGHS and Clarabel, which are given the same problems written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import Program, programs_of, transport_of
from torch import Tensor

from lightning_wdefense.attacks import ThreatModel, wasserstein_feasibility
from lightning_wdefense.attacks.wasserstein.ascent import ASCENTS
from lightning_wdefense.attacks.wasserstein.cost_reduction import Potentials, cheaper_plan
from lightning_wdefense.attacks.wasserstein.linear_oracle import best_plan
from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport, square
from lightning_wdefense.attacks.wasserstein.projection import (
    Multipliers,
    feasible_plan,
    nearest_plan,
    nearest_plan_with_capacity,
)

KINDS = {
    "full": lambda x: x,
    "sparse": lambda x: torch.where(x < 0.5, 0.0, 2 * x - 1),
    "saturated": lambda x: (2 * x - 0.5).clamp(0, 1),
    "binary": lambda x: (x > 0.4).to(x),
}
kinds = pytest.mark.parametrize("kind", KINDS)
BUDGETS = [0.003, 0.05, 0.4, 1.5, 100.0]
SQUARES = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]


def problems(squares: list[tuple[int, int]]):
    """Each neighbourhood with each budget, and with both each kind of image by turns."""
    rows = [
        (*square, share, [*KINDS][(i + j) % len(KINDS)])
        for i, square in enumerate(squares)
        for j, share in enumerate(BUDGETS)
    ]
    return pytest.mark.parametrize(("size", "p", "share", "kind"), rows)


def images(kind: str = "full", n: int = 2, shape: tuple[int, int, int] = (2, 8, 7), seed: int = 0) -> Tensor:
    return KINDS[kind](torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def noise(like: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def gained(transport: LocalTransport, plan: Tensor, values: Tensor) -> Tensor:
    return (transport.transported(plan) * values).sum((1, 2, 3))


def best_values(programs: list[Program], values: Tensor) -> Tensor:
    return values.new_tensor([program.most(each) for program, each in zip(programs, values, strict=True)])


# --- the linear oracle


@problems(SQUARES)
def test_the_best_plan_is_the_linear_programs(size, p, share, kind):
    x = images(kind)
    transport, values = transport_of(x, share**p, size, p, capacity=None), noise(x)
    plan = best_plan(transport, values)
    programs = programs_of(transport, x, p)
    for program, each in zip(programs, plan, strict=True):
        program.assert_plan(each, box=False)
    most = best_values(programs, values)
    torch.testing.assert_close(gained(transport, plan, values), most, rtol=1e-6, atol=1e-9)
    assert (most > gained(transport, transport.identity_plan(), values)).all()


TIES = {
    "one value everywhere": lambda x: torch.ones_like(x),
    "nothing": lambda x: torch.zeros_like(x),
    "integers": lambda x: noise(x).mul(1.5).round(),
    "a slope": lambda x: torch.arange(x.shape[-1], dtype=x.dtype).expand_as(x),
    "one bright spot": lambda x: torch.zeros_like(x).index_fill_(3, torch.tensor(3), 5.0),
}


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("share", [0.05, 0.7, 100.0])
def test_the_best_plan_among_equals(tie, p, share):
    x = images("binary")
    transport, values = transport_of(x, share, 5, p, capacity=None), TIES[tie](x)
    plan = best_plan(transport, values)
    for index, program in enumerate(programs_of(transport, x, p)):
        program.assert_plan(plan[index], box=False)
        assert float(gained(transport, plan, values)[index]) == pytest.approx(
            program.most(values[index]), rel=1e-6, abs=1e-9
        )
    if tie in ("one value everywhere", "nothing"):
        assert torch.equal(plan, transport.identity_plan()), "moving is not free"


def test_the_best_plan_does_not_know_the_room():
    x = images("saturated")
    with_room, without = (best_plan(transport_of(x, 0.3, capacity=capacity), noise(x)) for capacity in (1.0, None))
    assert torch.equal(with_room, without)


# --- the projection


def squares(program: Program, plan: Tensor | np.ndarray, goal: Tensor) -> float:
    own = program.variables(plan) if isinstance(plan, Tensor) else plan
    return float(np.square(own - program.variables(goal)).sum())


def goal_of(transport: LocalTransport, values: Tensor, step: float = 0.3) -> Tensor:
    return transport.identity_plan() + transport.gather_neighbours(step * values)


@problems([(3, 1), (5, 1), (5, 2)])
def test_the_nearest_plan_is_the_quadratic_programs(size, p, share, kind):
    x = images(kind, shape=(2, 6, 5))
    transport = transport_of(x, share**p, size, p, capacity=None)
    goal = goal_of(transport, noise(x))
    plan = nearest_plan(transport, goal)
    for program, each, target in zip(programs_of(transport, x, p), plan, goal, strict=True):
        program.assert_plan(each, box=False, tol=1e-6)
        nearest = program.nearest(target)
        np.testing.assert_allclose(program.variables(each), nearest, atol=1e-5)  # as far as Clarabel goes
        assert squares(program, each, target) == pytest.approx(squares(program, nearest, target), rel=1e-6)


@kinds
@pytest.mark.parametrize("p", [1, 2])
def test_a_plan_of_the_ball_is_nearest_to_itself(kind, p):
    x = images(kind)
    transport = transport_of(x, 0.3, 5, p, capacity=None)
    plan = best_plan(transport, noise(x))
    torch.testing.assert_close(nearest_plan(transport, plan), plan, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("kind", "share", "p"),
    [
        ("full", 0.05, 1),
        ("full", 0.05, 2),
        ("sparse", 0.4, 1),
        ("saturated", 0.4, 1),
        ("saturated", 0.05, 2),
        ("binary", 0.05, 1),
    ],
)
def test_the_nearest_plan_with_room_goes_to_the_quadratic_programs(kind, share, p):
    """With many steps: a hundredth of the way is left at most."""
    x = images(kind, n=2, shape=(1, 6, 5))
    transport = transport_of(x, share**p, 5, p)
    goal = goal_of(transport, noise(x))
    plan = feasible_plan(
        transport, nearest_plan_with_capacity(transport, goal, Multipliers.zeros(transport), iterations=500)[0]
    )
    for program, each, stay, target in zip(
        programs_of(transport, x, p), plan, transport.identity_plan(), goal, strict=True
    ):
        program.assert_plan(each, box=True, tol=1e-6)
        best, home = squares(program, program.nearest(target), target), squares(program, stay, target)
        assert (squares(program, each, target) - best) / (home - best) < 1e-2


def test_with_room_to_spare_it_is_the_nearest_plan():
    x = images()
    transport, limited = transport_of(x, 0.1, capacity=None), transport_of(x, 0.1, capacity=9.0)
    goal = goal_of(transport, noise(x))
    expected = nearest_plan(transport, goal)
    for each in (transport, limited):
        plan, prices = nearest_plan_with_capacity(each, goal, Multipliers.zeros(each), iterations=50)
        torch.testing.assert_close(plan, expected, atol=1e-6, rtol=0)
        assert not prices.capacity.any()


# --- how near to the optimum with the box


def random_problems(n: int = 4):
    """Small images of each kind, and the budgets at which the room matters."""
    shares = (0.05, 0.3, 1.0)
    for kind in KINDS:
        parts = [images(kind, n, (1, 7, 6), seed=int(100 * share)) for share in shares]
        values = [noise(part, seed=int(100 * share)) for part, share in zip(parts, shares, strict=True)]
        x = torch.cat(parts)
        yield x, transport_of(x, x.new_tensor(shares).repeat_interleave(n), 5), torch.cat(values)


@pytest.mark.parametrize(("method", "mean", "largest"), [("projected", 0.007, 0.05), ("frank-wolfe", 0.08, 0.3)])
def test_gap_to_the_optimum_with_the_box(method, mean, largest):
    """What 40 steps along one gradient leave of the best legal plan's gain, by HiGHS with a row for each pixel."""
    gaps = []
    for x, transport, values in random_problems():
        ascent = ASCENTS[method](transport, transport.identity_plan(), 40)
        start = best = gained(transport, ascent.feasible, values)
        for _ in range(40):
            ascent.move(values, gained(transport, ascent.feasible, values))
            best = torch.maximum(best, gained(transport, ascent.feasible, values))
        most = best_values(programs_of(transport, x), values)
        assert (best <= most + 1e-4).all(), "better than the best: not legal"
        gaps.append((most - best) / (most - start))
    gaps = torch.cat(gaps)
    assert gaps.mean() < mean
    assert gaps.max() < largest


def test_gap_of_the_projection_with_the_box():
    """What three steps of the dual and the repair leave of the way to the nearest legal plan; and nine, from warm prices."""
    cold, warm = [], []
    for x, transport, values in random_problems(3):
        goal, prices, gaps = goal_of(transport, values), Multipliers.zeros(transport), []
        for _ in range(3):
            plan, prices = nearest_plan_with_capacity(transport, goal, prices)
            gaps.append(feasible_plan(transport, plan))
        for index, program in enumerate(programs_of(transport, x)):
            best = squares(program, program.nearest(goal[index]), goal[index])
            home = squares(program, transport.identity_plan()[index], goal[index])
            for kept, plan in ((cold, gaps[0]), (warm, gaps[2])):
                kept.append((squares(program, plan[index], goal[index]) - best) / (home - best))
    assert min(cold + warm) > -1e-5, "nearer than the nearest: not legal"
    assert np.mean(cold) < 0.12
    assert np.mean(warm) < 0.015


# --- the repair


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7)),
    kind=st.sampled_from(sorted(KINDS)),
    share=st.floats(1e-3, 3.0),
    p=st.sampled_from([1, 2]),
    capacity=st.sampled_from([1.0, 1.0, None]),
    spread=st.floats(0.0, 3.0),
    seed=st.integers(0, 1000),
)
def test_what_is_repaired_is_legal(shape, kind, share, p, capacity, spread, seed):
    """Any plan at all, also one with negative entries and wrong masses."""
    x = images(kind, 3, shape, seed)
    x[:, 0, 0, 0] = 1.0  # no image without mass
    transport = transport_of(x, share, 3, p, capacity)
    plan = (transport.identity_plan() + spread * noise(transport.identity_plan(), seed)).masked_fill(
        ~transport.inside, 0
    )
    repaired = feasible_plan(transport, plan)
    for program, each in zip(programs_of(transport, x, p), repaired, strict=True):
        program.assert_plan(each, box=True, tol=1e-6)
    torch.testing.assert_close(transport.transported(repaired).sum((2, 3)), x.sum((2, 3)), rtol=1e-9, atol=1e-9)


@kinds
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_what_is_legal_stays_as_it_is(kind, share):
    x = images(kind)
    transport = transport_of(x, share)
    plan = feasible_plan(transport, best_plan(transport, noise(x)))
    torch.testing.assert_close(feasible_plan(transport, plan), plan, atol=1e-6, rtol=0)
    stay = transport.identity_plan()
    assert torch.equal(feasible_plan(transport, stay), stay)


def column(*values: float) -> Tensor:
    """A row of pixels with empty ones above and below (they are not needed: no move goes there)."""
    image = torch.zeros(1, 1, 3, len(values), dtype=torch.float64)
    image[0, 0, 1] = torch.tensor(values, dtype=torch.float64)
    return image


def move(transport: LocalTransport, x: Tensor, moves: dict[tuple[int, int], float]) -> Tensor:
    """A plan that moves amounts from a place to another of the middle row."""
    plan = transport.identity_plan()
    rows = {pixel: row for row, pixel in enumerate(x.flatten().nonzero().flatten().tolist())}
    width = x.shape[-1]
    for (source, target), amount in moves.items():
        row = rows[width + source]
        plan[0, transport.neighbourhood.centre, row] -= amount
        plan[0, transport.neighbourhood.centre + target - source, row] += amount
    return plan


def test_the_greatest_shares():
    """By hand: two send 0.4 each to a pixel with room for 0.2 that sends 0.2 away, so a half of each gets in."""
    x = column(0.5, 0.8, 0.5, 0.0)
    transport = transport_of(x, 100.0, 5, 1)
    plan = move(transport, x, {(0, 1): 0.4, (2, 1): 0.4, (1, 3): 0.2})
    after = transport.transported(feasible_plan(transport, plan))[0, 0, 1]
    torch.testing.assert_close(after, torch.tensor([0.3, 1.0, 0.3, 0.2], dtype=torch.float64), atol=1e-7, rtol=0)


def test_full_pixels_change_places():
    """Nothing overflows if all go at once; of a chain into a full end nothing gets in."""
    x = column(1.0, 1.0, 1.0, 1.0)
    transport = transport_of(x, 100.0, 3, 1)
    around = move(transport, x, {(0, 1): 0.7, (1, 0): 0.7})
    torch.testing.assert_close(feasible_plan(transport, around), around, atol=1e-9, rtol=0)
    chain = move(transport, x, {(0, 1): 0.3, (1, 2): 0.3, (2, 3): 0.3})
    torch.testing.assert_close(feasible_plan(transport, chain), transport.identity_plan(), atol=1e-6, rtol=0)


def test_what_costs_too_much_is_scaled_to_the_budget():
    x = column(0.5, 0.0, 0.0)
    transport = transport_of(x, 0.4, 5, 1)
    plan = feasible_plan(transport, move(transport, x, {(0, 2): 0.5}))
    torch.testing.assert_close(transport.transported(plan)[0, 0, 1], torch.tensor([0.4, 0.0, 0.1], dtype=torch.float64))


# --- plans and images


# --- the cheapest plan of an image


def there_and_back(transport: LocalTransport) -> Tensor:
    """A plan that is dearer than its image: the mean of the best plans for values that have nothing to do with each other."""
    shape = transport.budget.new_empty(transport.shape)
    return torch.stack([best_plan(transport, noise(shape, seed)) for seed in range(6)]).mean(0)


@pytest.mark.parametrize(("size", "p", "brightness"), [(3, 1, 0.02), (5, 1, 1.0), (5, 2, 0.02)])
def test_a_cheaper_plan_goes_to_the_linear_programs(size, p, brightness):
    """The same image at the least cost, by HiGHS; and from the potentials of an image nearby in a few steps."""
    x = brightness * images("sparse")
    transport = transport_of(x, 0.3, size, p, capacity=None)
    dear = there_and_back(transport)
    threat = ThreatModel("wasserstein", 1.0, bounds=None)
    found = wasserstein_feasibility(x, transport.transported(dear), threat, neighbourhood=size, p=p)
    exact = found.cost**p * x.sum((1, 2, 3))
    assert (transport.cost(dear) > 1.05 * exact).all(), "nothing to save"
    plan, potentials = cheaper_plan(transport, dear, Potentials.zeros(transport), iterations=2000)
    torch.testing.assert_close(transport.cost(plan), exact, rtol=5e-3, atol=0)
    torch.testing.assert_close(plan.sum(1), transport.masses)
    assert plan.min() >= 0
    assert not plan[~transport.inside].any()
    missed = (transport.transported(plan) - transport.transported(dear)).abs().sum((1, 2, 3))
    assert (missed < 0.01 * transport.budget).all()
    near = torch.lerp(dear, transport.identity_plan(), 0.02)
    warm, cold = (
        cheaper_plan(transport, near, each, iterations=5)[0] for each in (potentials, Potentials.zeros(transport))
    )
    assert (transport.cost(warm) < 0.98 * transport.cost(near)).all()

    def wrong(plan: Tensor) -> Tensor:
        return (transport.transported(plan) - transport.transported(near)).abs().sum((1, 2, 3)) / transport.budget

    assert (wrong(warm) < wrong(cold)).all()


def test_the_cheapest_plan_stays():
    x = images()
    transport = transport_of(x, 0.1)
    stay = transport.identity_plan()
    plan, potentials = cheaper_plan(transport, stay, Potentials.zeros(transport), iterations=50)
    torch.testing.assert_close(plan, stay)
    index = torch.tensor([1])
    part, some = cheaper_plan(transport.select(index), stay[index], potentials.select(index), iterations=3)
    whole, all_ = cheaper_plan(transport, stay, potentials, iterations=3)
    assert torch.equal(part, whole[index])
    assert torch.equal(some.arriving, all_.arriving[index])


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 8, 7), (2, 7, 11)])
def test_what_arrives_is_the_adjoint_of_what_is_seen(size, shape):
    x = images("sparse", 3, shape)
    transport = transport_of(x, 0.1, size)
    plan = noise(transport.identity_plan()).masked_fill(~transport.inside, 0)
    plan = plan * (transport.masses > 0).unsqueeze(1)
    values = noise(x, 2)
    left = (transport.transported(plan) * values).sum((1, 2, 3))
    right = (plan * transport.gather_neighbours(values)).sum((1, 2))
    torch.testing.assert_close(left, right)


def test_plans_are_laid_out_as_the_written_out_ones():
    x = images("sparse", 2, (2, 6, 5))
    transport = transport_of(x, 0.1, 5, 2)
    plan = torch.rand(transport.identity_plan().shape, dtype=torch.float64).masked_fill(~transport.inside, 0)
    plan = plan * (transport.masses > 0).unsqueeze(1)
    for index, program in enumerate(programs_of(transport, x, 2)):
        own = program.variables(plan[index])
        np.testing.assert_allclose(program.arrives @ own, transport.transported(plan)[index].flatten().numpy())
        assert float(transport.cost(plan)[index]) == pytest.approx(program.cost @ own)
    assert torch.equal(transport.transported(transport.identity_plan()), x)
    assert not transport.cost(transport.identity_plan()).any()


def test_some_of_the_images():
    x = images("sparse", 5)
    transport, index = transport_of(x, torch.arange(1, 6) / 10.0), torch.tensor([3, 0])
    part, values = transport.select(index), noise(x)
    plan = best_plan(transport, values)[index]
    assert torch.equal(best_plan(part, values[index]), plan)
    assert torch.equal(part.transported(plan), transport.transported(best_plan(transport, values))[index])
    assert torch.equal(feasible_plan(part, plan), feasible_plan(transport, best_plan(transport, values))[index])
    assert part.shape == (2, 2, 8, 7)


def test_a_square():
    near = square(5, 1)
    assert near.size == 5
    assert near.costs[near.centre] == 0
    assert [round(cost, 4) for cost in near.costs[:5]] == [2.8284, 2.2361, 2.0, 2.2361, 2.8284]
    assert square(5, 2).costs[0] == pytest.approx(8.0)
    assert sum(len(ring) for ring in near.rings) == 25

"""What a Wasserstein adversarial image costs, against closed forms and POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

from lightning_wdefense.attacks import ThreatModel, wasserstein_feasibility

THREAT = ThreatModel(norm="wasserstein", eps=1.0)


def image(*pixels: tuple[int, int, float], size: tuple[int, int] = (6, 7)) -> torch.Tensor:
    """Black but for some pixels: row, column, value."""
    it = torch.zeros(1, 1, *size, dtype=torch.float64)
    for row, column, value in pixels:
        it[0, 0, row, column] = value
    return it


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("move", [(0, 1), (1, 1), (0, 2), (-2, 1), (2, -2)])
def test_one_pixel_moved_costs_its_way(move, p):
    x, y = image((3, 3, 0.8)), image((3 + move[0], 3 + move[1], 0.8))
    found = wasserstein_feasibility(x, y, THREAT, p=p)
    assert found.cost.item() == pytest.approx(math.hypot(*move))
    assert found.mass.item() == found.box.item() == 0


def test_moving_part_of_an_image_costs_its_share():
    x = image((0, 0, 0.5), (4, 4, 0.5))
    part = image((0, 0, 0.5), (4, 4, 0.4), (4, 5, 0.1))
    assert wasserstein_feasibility(x, part, THREAT).cost.item() == pytest.approx(0.1)
    assert wasserstein_feasibility(x, part, THREAT, p=2).cost.item() == pytest.approx(math.sqrt(0.1))


def test_pixels_that_change_places():
    x, y = image((2, 2, 0.9), (2, 3, 0.3)), image((2, 2, 0.3), (2, 3, 0.9))
    assert wasserstein_feasibility(x, y, THREAT).cost.item() == pytest.approx(0.6 / 1.2)
    assert wasserstein_feasibility(x, x, THREAT) == (0, 0, 0)


def test_the_cheapest_plan_counts():
    """A row that moves on by one is its end that jumps, for p = 1; for p = 2 each pixel goes one step."""
    x = image(*((2, column, 0.5) for column in (1, 2)))
    y = image(*((2, column, 0.5) for column in (2, 3)))
    assert wasserstein_feasibility(x, y, THREAT).cost.item() == pytest.approx(1.0)
    assert wasserstein_feasibility(x, y, THREAT, p=2).cost.item() == pytest.approx(1.0)
    assert wasserstein_feasibility(x, y, THREAT, p=2, neighbourhood=3).cost.item() == pytest.approx(1.0)


def test_what_no_local_plan_reaches_is_infinitely_far():
    x, y = image((2, 0, 0.8)), image((2, 2, 0.8))
    assert wasserstein_feasibility(x, y, THREAT, neighbourhood=5).cost.item() == pytest.approx(2.0)
    assert wasserstein_feasibility(x, y, THREAT, neighbourhood=3).cost.item() == math.inf
    two = torch.cat([x, y], 1)
    assert wasserstein_feasibility(two, two.flip(1), THREAT, neighbourhood=3).cost.item() == math.inf
    lost = wasserstein_feasibility(x, x / 2, THREAT)
    assert lost.cost.item() == math.inf
    assert lost.mass.item() == pytest.approx(0.5)


@pytest.mark.parametrize("p", [1, 2])
def test_it_is_the_distance_of_optimal_transport(p):
    """Of images so small that the neighbourhood holds them."""
    x = torch.rand(4, 2, 3, 3, dtype=torch.float64) * (torch.rand(4, 2, 3, 3) > 0.3)
    y = torch.rand(4, 2, 3, 3, dtype=torch.float64) * (torch.rand(4, 2, 3, 3) > 0.3)
    y = y * x.sum((2, 3), keepdim=True) / y.sum((2, 3), keepdim=True)
    grid = np.stack(np.mgrid[:3, :3], -1).reshape(9, 2).astype(float)
    prices = cdist(grid, grid) ** p
    pad = torch.nn.ZeroPad2d(1)
    found = wasserstein_feasibility(pad(x), pad(y), ThreatModel("wasserstein", 1.0, bounds=None), p=p)
    for index, (a, b) in enumerate(zip(x, y, strict=True)):
        work = sum(ot.emd2(c.flatten().numpy(), d.flatten().numpy(), prices) for c, d in zip(a, b, strict=True))
        assert found.cost[index].item() == pytest.approx((work / float(a.sum())) ** (1 / p), rel=1e-6)


def test_mass_and_bounds_that_are_broken():
    x = image((1, 1, 0.5), (3, 3, 0.5))
    above = image((1, 1, 0.0), (1, 2, 1.25), (3, 3, 0.5))
    below = image((1, 1, 0.6), (1, 2, -0.1), (3, 3, 0.5))
    for bad, mass, box in ((above, 0.75, 0.25), (below, 0.0, 0.1)):
        found = wasserstein_feasibility(x, bad, THREAT)
        assert found.mass.item() == pytest.approx(mass, abs=1e-9)
        assert found.box.item() == pytest.approx(box)
        assert not found.feasible(10.0).item()
    scaled = wasserstein_feasibility(255 * x, 255 * above, ThreatModel("wasserstein", 1.0, bounds=(0, 255)))
    assert scaled.box.item() == pytest.approx(0.25)
    unbounded = ThreatModel("wasserstein", 1.0, bounds=None)
    crowded = image((1, 1, 1.5), (3, 3, 0.5))
    assert wasserstein_feasibility(crowded, crowded, unbounded).box.item() == 0


def test_what_leaves_one_channel_for_another_is_missed():
    x = torch.cat([image((1, 1, 0.5)), image((1, 1, 0.5))], 1)
    y = torch.cat([image((1, 1, 0.7)), image((1, 1, 0.3))], 1)
    found = wasserstein_feasibility(x, y, THREAT)
    assert found.mass.item() == pytest.approx(0.2)
    assert found.cost.item() == math.inf


def test_feasible_is_each_of_the_three():
    x = image((2, 2, 0.5), (3, 3, 0.5)).float().expand(4, 1, 6, 7)
    more = image((2, 2, 0.50005), (3, 3, 0.5))  # a change of mass that is rounding to its plan
    y = torch.cat([image((2, 3, 0.5), (3, 3, 0.5)), image((2, 2, 0.5), (3, 3, 0.5)), image((2, 2, 0.5)), more]).float()
    found = wasserstein_feasibility(x, y, THREAT)
    assert found.cost[3] == 0
    assert found.feasible(0.5).tolist() == [True, True, False, False]
    assert found.feasible(0.49).tolist() == [False, True, False, False]


def test_model_units():
    threat = ThreatModel("wasserstein", 1.0, mean=0.3, std=0.25)
    x, y = image((3, 3, 0.8)).float(), image((3, 5, 0.8)).float()
    found = wasserstein_feasibility(threat.to_model(x), threat.to_model(y), threat)
    assert found.cost.item() == pytest.approx(2.0, rel=1e-5)
    assert found.mass.item() < 1e-6
    assert found.box.item() < 1e-6

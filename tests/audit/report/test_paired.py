"""Paired differences against published values, SciPy and simulations."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_wdefense.audit.report.paired import mcnemar_p_value, newcombe_interval, paired_difference


@pytest.mark.parametrize(
    ("cells", "expected"),
    [  # Newcombe 1998, table III, method 10
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((54, 0, 0, 0), (-0.0664, 0.0664)),
        ((30, 0, 0, 0), (-0.1135, 0.1135)),
    ],
)
def test_published_intervals(cells, expected):
    assert newcombe_interval(*cells) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 9), (9, 3), (40, 41), (0, 12), (700, 800)])
def test_mcnemar_is_a_fair_coin(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p_value(first, second) == pytest.approx(expected, rel=1e-9)


def test_intervals_cover_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered, runs = 0, 1000
    for _ in range(runs):  # 60% are right for both, 15% for the first alone, 5% for the second alone
        draw = torch.rand(200, generator=generator)
        first, second = (draw < 0.75).float(), ((draw < 0.6) | (draw > 0.95)).float()
        found = paired_difference(first, second)
        covered += found.low <= 0.1 <= found.high
    assert covered / runs == pytest.approx(0.95, abs=0.02)


def test_difference_and_counts():
    first, second = torch.tensor([1.0, 1, 1, 0, 0, torch.nan]), torch.tensor([1.0, 0, 0, 1, 0, 1])
    found = paired_difference(first, second)
    assert found.difference == pytest.approx(0.2)
    assert (found.only_first, found.only_second) == (2, 1)
    assert found.p_value == 1.0
    assert found.low < 0.2 < found.high
    swapped = paired_difference(second, first)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_shares_of_masks_have_a_normal_interval():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 50, generator=generator).double()
    found = paired_difference(first, second)
    mean, error = float((first - second).mean()), stats.sem((first - second).numpy())
    assert (found.low, found.high) == pytest.approx(stats.norm.interval(0.95, mean, error), rel=1e-6)
    assert math.isnan(found.p_value)


def test_equal_models_and_no_samples():
    same = torch.tensor([1.0, 0, 1])
    assert paired_difference(same, same).difference == 0
    assert all(math.isnan(value) for value in paired_difference(same[:0], same[:0])[:3])

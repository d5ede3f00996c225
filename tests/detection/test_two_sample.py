"""The two-sample statistics against exact values, and their p-values against what they promise."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from support.random_state import SCIPY_SEED

from lightning_wdefense.defenses import mmd
from lightning_wdefense.detection import TwoSampleTest, two_sample_test

STATISTICS = ["energy", "mmd", "sinkhorn"]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_energy_distance():
    x, y = normal(0, 30, 1), normal(1, 45, 1) + 0.5
    expected = stats.energy_distance(x.flatten().double(), y.flatten().double()) ** 2
    assert two_sample_test(x, y, "energy").statistic.item() == pytest.approx(expected, rel=1e-3)
    x, y = normal(0, 30, 5) + 40, normal(1, 45, 5) + 40.5
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    assert two_sample_test(x, y, "energy").statistic.item() == pytest.approx(expected, rel=1e-3)


def test_mmd_is_that_of_the_defences():
    x, y = normal(0, 30, 5), normal(1, 45, 5) + 0.5
    torch.testing.assert_close(two_sample_test(x, y, "mmd").statistic, mmd(x, y), rtol=1e-3, atol=1e-6)


def test_sinkhorn_is_near_the_cost_of_transport():
    x = normal(0, 40, 2)
    y = x[torch.randperm(40)] + torch.tensor([3.0, 0.0])
    exact = ot.emd2([], [], cdist(x, y, "sqeuclidean") / 2)
    assert two_sample_test(x, y, "sinkhorn", permutations=1).statistic.item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_p_values_are_uniform_where_nothing_differs(statistic):
    values = [
        two_sample_test(
            normal(2 * seed, 15, 3), normal(2 * seed + 1, 20, 3), statistic, permutations=99, seed=seed
        ).p_value
        for seed in range(300)
    ]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert np.mean(np.array(values) <= 0.05) < 0.1
    assert min(values) >= 0.01


@pytest.mark.parametrize("statistic", STATISTICS)
def test_p_values(statistic):
    x, y = normal(0, 32, 3), normal(1, 24, 3)
    assert two_sample_test(x, y, statistic, permutations=39).p_value > 0.05
    assert two_sample_test(x, y + 2, statistic, permutations=39).p_value == pytest.approx(1 / 40)


def test_p_value_is_that_of_scipy():
    x, y = normal(0, 25, 1), normal(1, 30, 1) + 0.35

    def statistic(a, b):
        return stats.energy_distance(a, b) ** 2

    expected = stats.permutation_test(
        (x.flatten().numpy(), y.flatten().numpy()), statistic, n_resamples=2000, alternative="greater", **SCIPY_SEED
    )
    ours = two_sample_test(x, y, "energy", permutations=2000)
    assert ours.statistic.item() == pytest.approx(expected.statistic, rel=1e-3)
    assert ours.p_value == pytest.approx(expected.pvalue, abs=0.03)


def test_equal_samples_are_no_evidence():
    same = torch.ones(5, 2)
    for statistic in STATISTICS:
        assert two_sample_test(same, same, statistic, permutations=9).p_value == 1.0


def test_seed_decides_and_the_global_state_does_not():
    x, y = normal(0, 20, 2), normal(1, 20, 2) + 0.3
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = two_sample_test(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert two_sample_test(x, y) == first
    assert two_sample_test(x.double(), y.double()).p_value == pytest.approx(first.p_value, abs=0.02)
    assert two_sample_test(x, y, seed=1).p_value != first.p_value


def test_as_a_detector_of_batches():
    clean, batch = normal(0, 40, 2, 3), normal(1, 30, 2, 3) + 1
    got = TwoSampleTest("energy", permutations=50, seed=3).fit(clean).test(batch)
    assert got == two_sample_test(clean.flatten(1), batch.flatten(1), permutations=50, seed=3)


X = normal(0, 8, 3)
MISTAKES = {
    "statistic": (
        lambda: two_sample_test(X, X, "mdd"),
        ValueError,
        "no two-sample statistic 'mdd'. Did you mean 'mmd'",
    ),
    "permutations": (
        lambda: two_sample_test(X, X, permutations=0),
        ValueError,
        "permutations must be at least 1, got 0",
    ),
    "one point": (lambda: two_sample_test(X, X[:1]), ValueError, r"y must be.*at least 2 points, got shape \(1, 3\)"),
    "width": (lambda: two_sample_test(X, X[:, :2]), ValueError, r"x \(8, 3\) and y \(8, 2\)"),
    "NaN": (lambda: two_sample_test(X, X * torch.nan), ValueError, "y.*NaN"),
    "integers": (lambda: two_sample_test(X.long(), X), TypeError, "x must have a floating dtype"),
    "no tensor": (lambda: two_sample_test(None, X), TypeError, "x must be a torch.Tensor, got NoneType"),
    "not fitted": (lambda: TwoSampleTest().test(X), RuntimeError, r"is not fitted: call fit\(features\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    make, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match):
        make()

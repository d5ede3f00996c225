import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from support.random_state import SCIPY_SEED

from lightning_wdefense._dtype import default_dtype
from lightning_wdefense.metrics import Detectability, detectability


def normal(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ties", [False, True])
def test_against_scikit_learn(scale, ties):
    """Whatever the scale: nothing passes through a sigmoid."""
    clean, adversarial = normal(0, 150), normal(1, 90) + 0.7
    if ties:
        clean, adversarial = (4 * clean).round(), (4 * adversarial).round()
    clean, adversarial = scale * clean + 3 * scale, scale * adversarial + 3 * scale
    expected = roc_auc_score([0] * 150 + [1] * 90, torch.cat([clean, adversarial]))
    value, low, high = detectability(clean, adversarial)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert low < value < high
    assert detectability(adversarial, clean).value.item() == pytest.approx(1 - expected, abs=1e-6)


def test_interval_is_that_of_scipys_bootstrap():
    clean, adversarial = normal(0, 60), normal(1, 80) + 1

    def area(a, b):
        return (b[..., :, None] > a[..., None, :]).mean((-2, -1))

    def statistic(a, b, axis):
        return np.apply_along_axis(
            lambda row: area(row[: a.shape[-1]], row[a.shape[-1] :]), -1, np.concatenate([a, b], -1)
        )

    expected = stats.bootstrap(
        (clean.numpy(), adversarial.numpy()),
        statistic,
        n_resamples=4000,
        confidence_level=0.9,
        method="percentile",
        **SCIPY_SEED,
    ).confidence_interval
    _, low, high = detectability(clean, adversarial, resamples=4000, confidence=0.9)
    assert low.item() == pytest.approx(expected.low, abs=0.01)
    assert high.item() == pytest.approx(expected.high, abs=0.01)


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = stats.norm.cdf(1 / 2**0.5)  # P(N(1, 1) > N(0, 1))
    covered = []
    for seed in range(200):
        _, low, high = detectability(normal(2 * seed, 60), normal(2 * seed + 1, 60) + 1, resamples=300, confidence=0.9)
        covered.append(low <= truth <= high)
    assert 0.82 < np.mean(covered) < 0.97


def test_extremes():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert detectability(low, high) == (1, 1, 1)
    assert detectability(high, low) == (0, 0, 0)
    assert detectability(torch.zeros(5), torch.zeros(3)) == (0.5, 0.5, 0.5)
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert detectability(infinite, infinite).value == 0.5


def test_seed_decides_and_neither_order_nor_the_global_state_does():
    clean, adversarial = normal(0, 50), normal(1, 50) + 0.5
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = detectability(clean, adversarial)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert detectability(clean.flip(0), adversarial[torch.randperm(50)]) == first
    other = detectability(clean, adversarial, seed=1)
    assert other.value == first.value
    assert other.low != first.low


def test_parts_of_the_bootstrap_are_put_together(monkeypatch):
    clean, adversarial = normal(0, 50), normal(1, 50) + 0.5
    whole = detectability(clean, adversarial, resamples=2000)
    monkeypatch.setattr(sys.modules[detectability.__module__], "CHUNK", 2000)
    parts = detectability(clean, adversarial, resamples=2000)
    assert parts.low.item() == pytest.approx(whole.low.item(), abs=0.02)
    assert parts.high.item() == pytest.approx(whole.high.item(), abs=0.02)


def test_one_side_without_scores():
    metric = Detectability()
    metric.update(normal(0, 10), normal(1, 0))
    assert all(torch.isnan(end) for end in metric.compute())
    metric.update(normal(0, 0), normal(1, 10))
    assert metric.compute().value == detectability(normal(0, 10), normal(1, 10)).value


def test_holds_neither_the_callers_memory_nor_its_graph():
    clean, adversarial = normal(0, 20).requires_grad_(), normal(1, 20)
    metric = Detectability()
    metric.update(clean, adversarial)
    before = metric.compute()
    metric.update(normal(0, 0), normal(1, 0))
    adversarial.zero_()
    assert metric.compute() == before
    assert not metric.clean[0].requires_grad


def test_another_default_dtype_makes_no_difference():
    clean, adversarial = normal(0, 40), normal(1, 40) + 1
    expected = detectability(clean, adversarial)
    with default_dtype(torch.float64):
        assert detectability(clean, adversarial) == expected

"""Distributional accuracy against the linear program that defines it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from scipy.optimize import linprog

from lightning_wdefense.metrics import DistributionalAccuracy, distributional_accuracy

ORDERS = [1.0, 1.5, 2.0, 4.0, math.inf]


def exact(distances: np.ndarray, weights: np.ndarray, radius: float, p: float) -> float:
    """The accuracy that is left by the best share ``y_i`` of each sample's mass, by a solver."""
    weights, reachable = weights / weights.sum(), np.isfinite(distances)
    if math.isinf(p):
        return 1 - weights[distances <= radius].sum()
    if radius == 0:
        return 1 - weights[distances == 0].sum()
    # In units of the budget: the solver's tolerances are absolute.
    costs = weights * np.where(reachable, distances / radius, 0.0) ** p
    bounds = [(0, 1 if found else 0) for found in reachable]
    found = linprog(-weights, A_ub=costs[None], b_ub=[1.0], bounds=bounds, method="highs")
    return 1 + found.fun


def problem(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ties, samples that are misclassified or out of reach, and weights that may be 0."""
    generator = np.random.default_rng(seed)
    distances = generator.choice([0.0, 0.5, 1.0, np.inf, *generator.uniform(0.05, 3, 8)], size)
    weights = generator.choice([0.0, 1.0, *generator.uniform(0.1, 5, 4)], size)
    distances[0], weights[0] = 0.7, 1.0
    return distances, weights


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(ORDERS))
def test_is_the_optimum_of_the_linear_program(seed, size, p):
    distances, weights = problem(seed, size)
    radii = [0.0, 0.1, 0.5, 0.9, 2.0]
    curve = distributional_accuracy(torch.tensor(distances), radii, p, torch.tensor(weights))
    expected = [exact(distances, weights, radius, p) for radius in radii]
    np.testing.assert_allclose(curve.accuracies, expected, atol=1e-9)
    assert (curve.accuracies.diff() <= 1e-12).all()
    np.testing.assert_allclose(curve.area, np.trapezoid(expected, radii) / 2, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 3))
def test_a_larger_order_leaves_the_adversary_less(seed, radius):
    """The balls are nested: ``W_p`` grows with p."""
    distances, _ = problem(seed, 10)
    left = [distributional_accuracy(torch.tensor(distances), [radius], p).accuracies.item() for p in ORDERS]
    assert (np.diff(left) >= -1e-12).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.sampled_from(ORDERS))
def test_units_and_order_of_the_samples_change_nothing(seed, unit, p):
    distances, weights = (torch.tensor(each) for each in problem(seed, 9))
    plain = distributional_accuracy(distances, [0.4, 1.1], p, weights)
    other = distributional_accuracy(distances.flip(0) * unit, [0.4 * unit, 1.1 * unit], p, weights.flip(0) * 7)
    torch.testing.assert_close(other.accuracies, plain.accuracies, atol=1e-9, rtol=0)
    torch.testing.assert_close(other.area, plain.area, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [50.0, 2000.0, 1e9])
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_huge_order_is_the_pointwise_accuracy(p, unit):
    """Powers of the distances overflow and underflow by far; those just below a radius fall, those just above stay."""
    distances = torch.tensor([0.0, 0.3, 0.69, 0.71, 5.0], dtype=torch.float64)
    curve = distributional_accuracy(distances * unit, [0.7 * unit], p)
    assert curve.accuracies.item() == pytest.approx(0.4, abs=0.21 if p == 50 else 1e-9)
    assert curve.accuracies.item() <= 0.4 + 1e-9


def test_the_last_sample_is_split():
    curve = distributional_accuracy(torch.tensor([1.0, 2.0]), [math.sqrt(0.5), math.sqrt(1.5)], p=2)
    assert curve.accuracies.tolist() == pytest.approx([0.5, 0.25])  # half of the second sample's mass costs 4 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_distance_of_exactly_the_radius_falls(dtype):
    radii = [0.1, 0.3, 0.7]
    curve = distributional_accuracy(torch.tensor(radii, dtype=dtype), radii, math.inf)
    assert curve.accuracies.tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_float32_loses_nothing_in_large_sums():
    distances = torch.full((300_000,), 0.1)
    curve = distributional_accuracy(distances, [0.05], p=1)
    assert curve.accuracies.item() == pytest.approx(0.5, abs=1e-6)
    assert curve.accuracies.dtype == torch.float32


def test_certified_radii_give_the_other_side():
    true = torch.tensor([0.0, 0.4, 1.0, 2.0])
    certified, attacked = 0.8 * true, 1.1 * true
    lower, curve, upper = (
        distributional_accuracy(d, [0.3, 0.6, 0.9], p=2).accuracies for d in (certified, true, attacked)
    )
    assert (lower < curve).all()
    assert (curve < upper).all()


def test_weights_are_1_where_none_are_given():
    metric = DistributionalAccuracy([0.5, 1.0], p=1)
    metric.update(torch.tensor([0.0, 1.0]))
    metric.update(torch.tensor([2.0]), torch.tensor([2.0]))
    expected = distributional_accuracy(torch.tensor([0.0, 1.0, 2.0, 2.0]), [0.5, 1.0], p=1)
    torch.testing.assert_close(metric.compute(), expected)


def test_says_that_an_attack_found_nothing():
    nothing = torch.tensor([torch.inf, 0.0])
    with pytest.warns(UserWarning, match="fooled none of the 1 samples.*gradient may be masked"):
        assert distributional_accuracy(nothing, [1.0]).accuracies == 0.5
    metric = DistributionalAccuracy([1.0])
    metric.update(nothing[:1])  # no error before all samples are known
    with pytest.raises(ValueError, match=r"All 1 distances are infinite.*gradient may be masked.*too few steps"):
        metric.compute()


def test_plot_names_the_order():
    metric = DistributionalAccuracy([0.5, 1.0], p=1)
    metric.update(torch.tensor([0.0, 1.0]))
    _, ax = metric.plot(label="TRADES")
    assert ax.get_xlabel() == "radius of the Wasserstein ball (W_1)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["TRADES (area=0.125)"]
    pyplot.close("all")

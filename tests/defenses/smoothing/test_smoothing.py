"""Randomised smoothing: the mathematics against closed forms and exact solvers, the procedure against what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ot
import pytest
import torch
from scipy import stats
from scipy.optimize import linprog
from support.modules import Nasty, Snapshot

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.defenses import (
    Certificate,
    GaussianSmoothing,
    RandomizedSmoothing,
    WassersteinSmoothing,
    certified_accuracy_curve,
)
from lightning_wdefense.defenses.smoothing.binomial import lower_bound, two_sided_p_value
from lightning_wdefense.defenses.smoothing.flows import apply_flow, laplace_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *shape, generator=generator(seed))


class Threshold(torch.nn.Module):
    """Class 1 where a linear function of the image exceeds a threshold."""

    def __init__(self, weight: torch.Tensor, threshold: float) -> None:
        super().__init__()
        self.weight, self.threshold = weight, threshold

    def forward(self, x):
        z = (x * self.weight).flatten(1).sum(1) - self.threshold
        return torch.stack([-z, z], 1)


# --- flows


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 2, 6), (2, 1, 5), (1, 4, 1), (1, 1, 1)], ids=str)
def test_noise_keeps_the_mass_of_every_channel(shape):
    x = images(6, *shape).double()
    moved = WassersteinSmoothing(sigma=0.1).noisy(x)
    torch.testing.assert_close(moved.sum((2, 3)), x.sum((2, 3)))
    assert (moved - x).abs().max() > 1e-3 or math.prod(shape[1:]) == 1


def test_a_flow_moves_what_it_says():
    x = torch.zeros(1, 1, 3, 3)
    horizontal, vertical = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 3)
    horizontal[0, 0, 1, 0], vertical[0, 0, 1, 1] = 2.0, 0.5
    moved = apply_flow(x, horizontal, vertical)[0, 0]
    assert moved.tolist() == [[0, 0, 0], [-2, 1.5, 0], [0, 0.5, 0]]


def test_the_shortest_flow_is_the_exact_transport_cost():
    """Over all flows between two images, by linear programming, beside the optimal transport on the grid."""
    height, width = 3, 4
    x, y = (images(1, 1, height, width, seed=seed).double() for seed in (0, 1))
    x, y = x / x.sum(), y / y.sum()
    horizontal, vertical = height * (width - 1), (height - 1) * width
    columns = [
        apply_flow(
            torch.zeros(1, 1, height, width).double(), h.view(1, 1, height, -1), v.view(1, 1, -1, width)
        ).flatten()
        for h, v in ((each[:horizontal], each[horizontal:]) for each in torch.eye(horizontal + vertical).double())
    ]
    moves = torch.stack(columns, 1).numpy()
    problem = linprog(
        np.ones(2 * moves.shape[1]), A_eq=np.hstack([moves, -moves]), b_eq=(y - x).flatten().numpy(), bounds=(0, None)
    )
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    manhattan, euclidean = (ot.emd2(x.flatten(), y.flatten(), torch.cdist(grid, grid, p=p)).item() for p in (1, 2))
    assert problem.fun == pytest.approx(manhattan, rel=1e-6)
    assert manhattan / math.sqrt(2) <= euclidean <= manhattan


def test_noise_is_laplace():
    noise = laplace_noise((20000,), torch.empty(0), generator())
    assert stats.kstest(noise.numpy(), "laplace").pvalue > 0.01


def test_sigma_is_the_standard_deviation_of_a_share_of_the_mass():
    two = torch.tensor([30.0, 10.0]).view(1, 1, 1, 2).expand(20000, -1, -1, -1)
    moved = WassersteinSmoothing(sigma=0.05).noisy(two) - two
    assert moved[..., 0].std() == pytest.approx(0.05 * 40, rel=0.03)
    assert moved[..., 0].mean() == pytest.approx(0, abs=0.06)


# --- the binomial bound


@pytest.mark.parametrize("trials", [1, 20, 1000, 20000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
def test_lower_bound(trials, alpha):
    successes = torch.tensor(sorted({0, 1, trials // 2, trials - trials // 10, trials - 1, trials}))
    expected = [0.0 if k == 0 else stats.beta.ppf(alpha, k, trials - k + 1) for k in successes.tolist()]
    np.testing.assert_allclose(lower_bound(successes, trials, alpha), expected, rtol=1e-6, atol=1e-12)
    assert lower_bound(torch.tensor([1, 1, 0]), trials, alpha)[:2].diff() == 0


def test_p_value():
    pairs = [(1, 1), (3, 4), (50, 100), (60, 100), (900, 1000)]
    expected = [stats.binomtest(k, n, 0.5).pvalue for k, n in pairs]
    np.testing.assert_allclose(two_sided_p_value(*torch.tensor(pairs).T), expected, rtol=1e-6)


# --- the smoothed classifiers: a linear model of two pixels, for which all is known. A new one joins by a line in ``KINDS``.

MASS = torch.tensor([0.6, 0.4]).view(1, 1, 1, 2)
LEFT = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)


class Kind(NamedTuple):
    """A smoothing whose noise moves the left pixel."""

    make: Callable[..., RandomizedSmoothing]
    noise: Any  # distribution of the left pixel's change for sigma = 1
    away: list[float]  # what moves an image against LEFT by a distance of 1


KINDS = {
    "wasserstein": Kind(partial(WassersteinSmoothing, ground="manhattan"), stats.laplace(scale=1 / math.sqrt(2)), [-1.0, 1.0]),
    "gaussian": Kind(GaussianSmoothing, stats.norm, [-1.0, 0.0]),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.mark.parametrize("threshold", [0.55, 0.6, 0.7])
def test_probabilities_of_a_linear_model(kind, threshold):
    sigma = 0.1
    counts = kind.make(sigma=sigma)._count(Threshold(LEFT, threshold), MASS, torch.float32, 20000, generator())
    assert counts[0, 1].item() / 20000 == pytest.approx(kind.noise.sf((threshold - 0.6) / sigma), abs=0.015)


def test_the_radius_is_exact_for_a_linear_model(kind):
    """Moving against a half-space is the worst there is, so the bound is met with equality."""
    sigma, threshold = 0.1, 0.5
    for left in (0.55, 0.6, 0.8):
        probability = torch.tensor(kind.noise.sf((threshold - left) / sigma))
        assert kind.make(sigma=sigma).radius(probability).item() == pytest.approx(left - threshold, rel=1e-6)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5])
def test_no_radius_without_a_majority(kind, probability):
    assert kind.make().radius(torch.tensor(probability)) == 0


def test_radius_beside_the_papers():
    p = torch.linspace(0.501, 0.999, 50).double()
    manhattan = WassersteinSmoothing(sigma=0.2, ground="manhattan").radius(p)
    paper = 0.2 / (2 * math.sqrt(2)) * (p / (1 - p)).log()
    assert (manhattan >= paper - 1e-9).all()
    torch.testing.assert_close(WassersteinSmoothing(sigma=0.2).radius(p), manhattan / math.sqrt(2))


def test_gaussian_noise_has_its_sigma_in_every_value():
    zeros = torch.zeros(5000, 3, 2)
    noise = GaussianSmoothing(sigma=0.3).noisy(zeros)
    torch.testing.assert_close(noise.std(0), torch.full((3, 2), 0.3), rtol=0.05, atol=0)
    assert stats.kstest(noise.flatten().numpy() / 0.3, "norm").pvalue > 0.01


def test_certified_radii_hold_against_the_worst_move(kind):
    """The smoothed class does not change when the image moves by just under the radius, and does a little beyond."""
    sigma = 0.1
    smoothing = kind.make(sigma=sigma, samples=50000, selection=100, alpha=0.01)
    classes, radii = smoothing.certify(Threshold(LEFT, 0.5), MASS)
    assert classes.item() == 1
    assert 0.09 < radii.item() <= 0.1  # the distance to the hyperplane
    within, beyond = (MASS + by * torch.tensor(kind.away) for by in (0.95 * radii.item(), 0.103))
    exact = [kind.noise.sf((0.5 - x[..., 0].item()) / sigma) for x in (within, beyond)]
    assert exact[0] > 0.5 > exact[1]


def test_certificates_are_wrong_no_more_often_than_alpha(kind):
    """The true radius is known, so that overestimates can be counted."""
    smoothing = kind.make(sigma=0.1, samples=200, selection=20, alpha=0.1)
    model, true = Threshold(LEFT, 0.5), 0.1
    wrong = [
        smoothing.certify(model, MASS, generator=generator(seed)).radii.item() > true + 1e-6 for seed in range(300)
    ]
    assert np.mean(wrong) < 0.16
    assert np.mean(wrong) > 0.01  # nor is it timid


def test_abstains_where_it_is_a_toss_up(kind):
    smoothing = kind.make(sigma=0.1, samples=500, selection=50, alpha=0.001)
    model = Threshold(LEFT, 0.6)
    certificate = smoothing.certify(model, MASS)
    assert certificate.classes.tolist() == [-1]
    assert certificate.radii.tolist() == [0]
    assert smoothing.predict(model, MASS).tolist() == [-1]
    assert smoothing.predict(Threshold(LEFT, 0.3), MASS).tolist() == [1]


def test_units_of_the_model_change_nothing(kind):
    threat = ThreatModel(mean=0.3, std=0.4)
    model = Threshold(LEFT, 0.5)
    plain = kind.make(sigma=0.1, samples=300, selection=30)
    normalised = kind.make(sigma=0.1, samples=300, selection=30, threat=threat)
    expected = plain.certify(model, MASS)
    got = normalised.certify(lambda x: model(threat.to_data(x)), threat.to_model(MASS))
    assert got.classes.equal(expected.classes)
    torch.testing.assert_close(got.radii, expected.radii, atol=2e-3, rtol=0.05)
    torch.testing.assert_close(threat.to_data(normalised.noisy(threat.to_model(MASS))), plain.noisy(MASS))


def test_brightness_changes_nothing():
    model = Threshold(LEFT, 0.5)
    smoothing = WassersteinSmoothing(sigma=0.1, samples=300, selection=30)
    bright = smoothing.certify(lambda x: model(x / 255), 255 * MASS)
    torch.testing.assert_close(bright.radii, smoothing.certify(model, MASS).radii, atol=2e-3, rtol=0.05)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 2, 2)], ids=str)
def test_gaussian_noise_suits_inputs_of_any_shape(shape):
    x = torch.full((2, *shape), 0.2)
    model = Threshold(torch.ones(1, *shape) / math.sqrt(math.prod(shape)), 0.0)
    classes, radii = GaussianSmoothing(sigma=0.3, samples=2000, selection=20).certify(model, x)
    assert classes.tolist() == [1, 1]
    distance = 0.2 * math.sqrt(math.prod(shape))
    assert (radii <= distance).all()
    assert (radii > min(0.8 * distance, 0.7)).all()  # so many copies certify no more than 0.88


def test_the_same_call_gives_the_same_and_the_size_of_the_batches_hardly_matters(kind):
    x, model = images(3, 1, 4, 4), Threshold(images(1, 1, 4, 4, seed=5), 4.0)
    smoothing = kind.make(sigma=0.05, samples=400, selection=40)
    torch.manual_seed(1)
    first = smoothing.certify(model, x)
    torch.manual_seed(2)
    again = smoothing.certify(model, x)
    assert torch.equal(first.radii, again.radii)
    assert torch.equal(first.classes, again.classes)
    parts = kind.make(sigma=0.05, samples=400, selection=40, batch_size=64).certify(model, x)
    torch.testing.assert_close(parts.radii, first.radii, atol=0.02, rtol=0.5)
    with torch.inference_mode():
        assert torch.equal(smoothing.certify(model, x.clone()).radii, first.radii)


@pytest.mark.parametrize("fail_at", [None, 1, 3])
@pytest.mark.parametrize("ask", ["predict", "certify"])
def test_leaves_the_model_as_it_was(kind, fail_at, ask):
    x, model = images(2, 1, 6, 6), Nasty(36, fail_at=fail_at)
    kept, snapshot = x.clone(), Snapshot(model)
    smoothing = kind.make(samples=20, selection=5, batch_size=10)
    if fail_at is None:
        getattr(smoothing, ask)(model, x)
    else:
        with pytest.raises(RuntimeError, match="nasty failure"):
            getattr(smoothing, ask)(model, x)
    snapshot.check()
    assert torch.equal(x, kept)
    assert not any(model.seen_modes.values())


def test_certified_accuracy():
    certificate = Certificate(torch.tensor([0, 1, 2, -1, 1]), torch.tensor([0.05, 0.2, 0.3, 0.0, 0.4]))
    curve = certified_accuracy_curve(certificate, torch.tensor([0, 1, 0, 1, 1]), [0.0, 0.1, 0.2, 0.3])
    assert curve.accuracies.tolist() == pytest.approx([0.6, 0.4, 0.2, 0.2])
    assert curve.auac.item() == pytest.approx((0.1 * 0.5 + 0.1 * 0.3 + 0.1 * 0.2) / 0.3)


X = images(2, 1, 4, 4)
MODEL = Threshold(X[:1], 1.0)
MISTAKES = {
    "sigma": (lambda: WassersteinSmoothing(sigma=0.0), ValueError, "sigma must be positive.*0.0"),
    "ground": (lambda: WassersteinSmoothing(ground="euclid"), ValueError, "ground distance 'euclid'. Did you mean 'euclidean'"),
    "samples": (lambda: WassersteinSmoothing(samples=0), ValueError, "samples must be at least 1, got 0"),
    "alpha": (lambda: WassersteinSmoothing(alpha=5), ValueError, "alpha must be between 0 and 1.*got 5"),
    "rows": (lambda: WassersteinSmoothing().predict(MODEL, X.flatten(1)), ValueError, r"images \(N, C, H, W\).*got shape \(2, 16\)"),
    "integers": (lambda: WassersteinSmoothing().predict(MODEL, X.byte()), TypeError, "float tensor.*uint8"),
    "negative": (lambda: WassersteinSmoothing().certify(MODEL, X - 0.5), ValueError, r"range from -0\.\d+ to.*threat=ThreatModel\(mean="),
    "NaN": (lambda: WassersteinSmoothing().noisy(X * torch.nan), ValueError, "finite and not negative"),
    "black": (lambda: WassersteinSmoothing().certify(MODEL, torch.zeros(1, 1, 4, 4)), ValueError, "no mass"),
    "pixels": (lambda: WassersteinSmoothing(samples=5).predict(lambda x: x.expand(-1, 2, -1, -1), X), ValueError, "one class per sample"),
    "Gaussian sigma": (lambda: GaussianSmoothing(sigma=-1.0), ValueError, "sigma must be positive and finite \\(data units\\), got -1.0"),
    "Gaussian NaN": (lambda: GaussianSmoothing().noisy(X * torch.nan), ValueError, "NaN or infinite"),
    "no rows": (lambda: GaussianSmoothing().certify(MODEL, X[0, 0, 0]), ValueError, r"must be \(N, ...\).*got shape \(4,\)"),
    "empty": (lambda: GaussianSmoothing().predict(MODEL, X[:0]), ValueError, r"one or more samples.*\(0, 1, 4, 4\)"),
    "Gaussian integers": (lambda: GaussianSmoothing().predict(MODEL, X.byte()), TypeError, "float tensor.*uint8"),
    "labels": (lambda: certified_accuracy_curve(Certificate(torch.tensor([1]), torch.tensor([1.0])), torch.tensor([1, 2]), [0.0, 1.0]), ValueError, r"1 integers.*\(2,\)"),
    "epsilons": (lambda: certified_accuracy_curve(Certificate(torch.tensor([1]), torch.tensor([1.0])), torch.tensor([1]), [0.5, 1.0]), ValueError, "start at 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    make, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match):
        make()

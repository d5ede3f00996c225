"""Each detector's scores against scikit-learn, SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KernelDensity as SklearnKernelDensity
from sklearn.neighbors import NearestNeighbors

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.detection import (
    LID,
    CriticScore,
    Energy,
    FeatureSqueezing,
    KernelDensity,
    KNNDistance,
    Mahalanobis,
    MaxSoftmax,
    get_detector,
)
from lightning_wdefense.detection.feature_squeezing import median_filter, reduce_bit_depth


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_max_softmax_and_energy():
    logits = 5 * normal(0, 50, 7)
    probabilities = softmax(logits.double().numpy(), axis=1)
    np.testing.assert_allclose(MaxSoftmax().score(logits), -np.log(probabilities.max(1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(Energy().score(logits), -logsumexp(logits.numpy(), axis=1), rtol=1e-5)


def test_max_softmax_tells_confident_samples_apart():
    """In float32, 1 - max p is 0 for all of them."""
    logits = torch.tensor([[20.0, 0.0], [30.0, 0.0], [60.0, 0.0]])
    np.testing.assert_allclose(MaxSoftmax().score(logits), np.exp([-20.0, -30.0, -60.0]), rtol=1e-5)


@pytest.mark.parametrize("make", [MaxSoftmax, Energy])
def test_a_single_logit_is_two(make):
    logit = normal(0, 9)
    expected = make().score(torch.stack([torch.zeros(9), logit], 1))
    torch.testing.assert_close(make().score(logit), expected)
    torch.testing.assert_close(make().score(logit[:, None]), expected)


@pytest.mark.parametrize(("n", "width"), [(300, 5), (60, 100)], ids=["many samples", "more features than samples"])
def test_mahalanobis(n, width):
    labels = torch.arange(n) % 3
    clean = normal(0, n, width) @ normal(1, width, width) + 10 * normal(2, 3, width)[labels] + 100
    clean[:, 0] = 7.0  # a unit that is always off
    unseen = clean[:20] + normal(3, 20, width)
    points, classes = clean.double().numpy(), labels.numpy()
    means = np.stack([points[classes == c].mean(0) for c in range(3)])
    covariance = LedoitWolf(assume_centered=True).fit(points - means[classes])
    distances = []
    for mean in means:
        covariance.location_ = mean
        distances.append(covariance.mahalanobis(unseen.double().numpy()))
    scores = Mahalanobis().fit(clean, labels * 5 - 3).score(unseen)
    np.testing.assert_allclose(scores, np.min(distances, axis=0), rtol=2e-3)


def test_mahalanobis_of_gaussians_is_chi_squared():
    clean, labels = normal(0, 4000, 8), torch.arange(4000) % 2
    mixing = normal(1, 8, 8)
    detector = Mahalanobis().fit(clean @ mixing + 1000 * labels[:, None], labels)
    scores = detector.score(normal(2, 4000, 8) @ mixing)
    assert scores.mean() == pytest.approx(8, rel=0.05)
    assert scores.var() == pytest.approx(16, rel=0.15)


def test_mahalanobis_where_classes_have_no_spread():
    scores = (
        Mahalanobis()
        .fit(torch.eye(3).repeat(2, 1), torch.arange(6) % 3)
        .score(torch.eye(3) * torch.tensor([1.0, 2.0, 3.0]))
    )
    assert scores.isfinite().all()
    assert scores[0] < scores[1] < scores[2]


def test_knn():
    clean, unseen = normal(0, 200, 30) + 50, normal(1, 40, 30) + 50
    distances, _ = NearestNeighbors(n_neighbors=7).fit(clean.double()).kneighbors(unseen.double())
    np.testing.assert_allclose(KNNDistance(7).fit(clean).score(unseen), distances[:, -1], rtol=1e-4)
    np.testing.assert_allclose(
        LID(7).fit(clean).score(unseen), -1 / np.log(distances / distances[:, -1:]).mean(1), rtol=1e-3
    )


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_lid_of_a_uniform_cube_is_its_dimension(dimension):
    """Also where the cube lies in a larger space."""
    cube = torch.rand(20000, dimension, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(normal(1, 12, dimension)).Q
    centres = 0.5 + 0.05 * normal(2, 40, dimension)
    assert LID(k=100).fit(cube @ basis.T).score(centres @ basis.T).mean() == pytest.approx(dimension, rel=0.12)


@pytest.mark.parametrize("bandwidth", [None, 0.7])
def test_kernel_density(bandwidth):
    clean, unseen = 3 * normal(0, 200, 4) + 20, 3 * normal(1, 40, 4) + 20
    used = bandwidth or clean.double().numpy().var(0).mean() ** 0.5 * 200 ** (-1 / 8)
    scores = KernelDensity(bandwidth).fit(clean).score(unseen).numpy()
    squares = cdist(unseen.double(), clean.double(), "sqeuclidean") / used**2
    expected = np.log(200) + 2 * np.log(2 * np.pi * used**2) - logsumexp(-squares / 2, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    # Far out the tree of scikit-learn's estimate is not exact.
    near = expected < 15
    estimate = SklearnKernelDensity(bandwidth=used).fit(clean.double()).score_samples(unseen[near].double())
    np.testing.assert_allclose(scores[near], -estimate, rtol=1e-3)
    assert near.sum() > 20


def test_critic():
    torch.testing.assert_close(
        CriticScore(lambda x: x.sum(1, keepdim=True)).score(torch.ones(3, 2)), torch.full((3,), -2.0)
    )


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth(bits):
    data = torch.rand(100, generator=torch.Generator().manual_seed(0))
    levels = 2**bits - 1
    np.testing.assert_allclose(reduce_bit_depth(data, bits), np.round(data.numpy() * levels) / levels, atol=1e-6)
    wide = reduce_bit_depth(data * 255 - 10, bits, (-10.0, 245.0))
    np.testing.assert_allclose(wide, np.round(data.numpy() * levels) / levels * 255 - 10, atol=1e-3)
    reduce_bit_depth(data.requires_grad_(), bits).sum().backward()
    assert torch.equal(data.grad, torch.ones(100))  # straight through, so that an attack can be told to evade it


@pytest.mark.parametrize("size", [3, 5])
def test_median_filter(size):
    images = torch.rand(2, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    expected = ndimage.median_filter(images.numpy(), size=(1, 1, size, size), mode="nearest")
    np.testing.assert_array_equal(median_filter(images, size), expected)


def test_feature_squeezing_in_the_units_of_the_model():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))
    inputs = torch.rand(10, 1, 6, 6)
    threat = ThreatModel(mean=0.3, std=0.4)
    detector = FeatureSqueezing(threat, lambda x: model(threat.to_data(x)), bits=2)
    with torch.no_grad():
        before, *after = (model(x).softmax(1) for x in (inputs, (inputs * 3).round() / 3, median_filter(inputs, 3)))
    expected = torch.stack([(each - before).abs().sum(1) for each in after]).amax(0)
    torch.testing.assert_close(detector.score(threat.to_model(inputs)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mahalanobis", "knn", "kernel-density"])
def test_detects_what_lies_outside(name):
    clean, labels = normal(0, 300, 10), torch.arange(300) % 3
    centres = 6 * normal(1, 3, 10)
    detector = get_detector(name).fit(clean + centres[labels], labels)
    unseen, outside = normal(2, 100, 10) + centres[0], normal(3, 100, 10) + centres[0] + 2.0
    scores = torch.cat([detector.score(unseen), detector.score(outside)])
    assert roc_auc_score([0] * 100 + [1] * 100, scores) > 0.95

"""What every detector promises, tested for each line of the table."""

from __future__ import annotations

import copy
import pickle
import sys
from contextlib import nullcontext

import pytest
import torch
from support.detectors import DETECTOR_CASES, WIDTH
from support.modules import Nasty, Snapshot

from lightning_wdefense.attacks import ThreatModel
from lightning_wdefense.detection import DETECTORS, FeatureSqueezing, Mahalanobis, get_detector

every_detector = pytest.mark.parametrize("name", DETECTOR_CASES)
learning = [name for name, case in DETECTOR_CASES.items() if case().learns]
LABELS = torch.arange(60) % 3


def features(seed: int, n: int = 60, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def fitted(name: str, clean=None, labels=LABELS):
    return DETECTOR_CASES[name]().fit(features(0) if clean is None else clean, labels)


def test_the_table_is_complete():
    assert set(DETECTOR_CASES) == set(DETECTORS)
    assert all(case().name == name for name, case in DETECTOR_CASES.items())


@every_detector
def test_one_finite_score_a_sample(name):
    clean, unseen = features(0), features(1, n=9)
    detector = DETECTOR_CASES[name]()
    assert detector.fit(clean, LABELS) is detector
    scores = detector.score(unseen)
    assert scores.shape == (9,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert len(scores.unique()) > 3
    torch.testing.assert_close(
        torch.cat([detector.score(one) for one in unseen.split(1)]), scores, rtol=1e-4, atol=1e-5
    )
    assert detector.score(clean).isfinite().all(), "its own clean samples"
    same = DETECTOR_CASES[name]().fit(clean.view(60, 2, 3), LABELS)
    if detector.reads == "features":
        torch.testing.assert_close(same.score(unseen.view(9, 2, 3)), scores)


@every_detector
def test_copies_score_alike_and_fitting_again_forgets(name):
    detector = fitted(name)
    expected = detector.score(features(1))
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector)) if name != "critic" else detector):
        assert torch.equal(twin.score(features(1)), expected)
    detector.fit(3 * features(5), LABELS)
    detector.fit(features(0), LABELS)
    assert torch.equal(detector.score(features(1)), expected)


@every_detector
def test_keeps_a_copy_of_its_own(name):
    clean = features(0)
    detector = fitted(name, clean)
    expected = detector.score(features(1))
    clean.zero_()
    assert torch.equal(detector.score(features(1)), expected)


@every_detector
def test_half_precision_and_autocast_and_inference_mode(name):
    clean, unseen = features(0).bfloat16(), features(1).bfloat16()
    expected = fitted(name, clean.float()).score(unseen.float())
    if name not in ("feature-squeezing", "critic"):  # which run a module, in the dtype that it was given
        assert torch.equal(fitted(name, clean).score(unseen), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fitted(name, clean.float()).score(unseen.float()), expected)
    with torch.inference_mode():
        detector = fitted(name, clean.float().clone())
        assert torch.equal(detector.score(unseen.float().clone()), expected)
    assert torch.equal(detector.score(unseen.float()), expected)


@every_detector
def test_a_gradient_says_how_to_evade(name):
    detector = fitted(name)
    point = 2 * features(1, n=20)
    before = detector.score(point)
    moved = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(detector.score(moved).sum(), moved)
    assert gradient.isfinite().all()
    after = detector.score(point - 1e-2 * gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-9))
    lower = (after < before) | (gradient.abs().amax(1) == 0)
    assert lower.float().mean() > (0.5 if name == "feature-squeezing" else 0.9)  # that one only estimates its gradient


@pytest.mark.parametrize("name", [name for name, case in DETECTOR_CASES.items() if case().reads == "features"])
def test_layers_add_up(name):
    if name == "critic":
        pytest.skip("is one layer's")
    one, other = features(0), 3 * features(2, width=4)
    both = fitted(name, [one, other])
    score = fitted(name, one).score(features(1)) + fitted(name, other).score(features(3, width=4))
    torch.testing.assert_close(both.score([features(1), features(3, width=4)]), score)


MISTAKES = {
    "other width": (lambda d: d.score(features(1, width=WIDTH - 1)), ValueError, r"fitted on features of width 6, got 5"),
    "other layers": (lambda d: d.score([features(1)] * 2), ValueError, r"of width 6, got \[6, 6\]"),
    "NaN": (lambda d: d.score(features(1) * torch.nan), ValueError, "NaN or infinite.*diverged"),
    "infinite": (lambda d: d.fit(features(1) / 0, LABELS), ValueError, "NaN or infinite"),
    "integers": (lambda d: d.score(features(1).long()), TypeError, "float tensor.*int64"),
    "nothing": (lambda d: d.fit(None), TypeError, "NoneType"),
    "no samples": (lambda d: d.fit(features(1)[:0], LABELS[:0]), ValueError, r"at least one sample.*\(0, 6\)"),
    "labels' length": (lambda d: d.fit(features(1), LABELS[:5]), ValueError, r"\(60,\), got \(5,\)"),
    "soft labels": (lambda d: d.fit(features(1), features(1)), TypeError, "argmax of soft labels"),
    "layers of other samples": (lambda d: d.fit([features(1), features(1)[:5]]), ValueError, "same samples, got 60 and 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", learning)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(name, mistake):
    make, kind, match = MISTAKES[mistake]
    detector = fitted(name)
    expected = detector.score(features(1))
    with pytest.raises((kind, TypeError) if mistake == "nothing" else kind, match=match):
        make(detector)
    assert torch.equal(detector.score(features(1)), expected), "a mistake must not spoil what was fitted"


@pytest.mark.parametrize("name", learning)
def test_asked_before_fitted(name):
    with pytest.raises(RuntimeError, match=r"is not fitted: call fit\(features, labels\)"):
        DETECTOR_CASES[name]().score(features(1))


SETTINGS = {
    "unknown": (lambda: get_detector("mahalonobis"), ValueError, "no detector 'mahalonobis'. Did you mean 'mahalanobis'"),
    "k": (lambda: get_detector("knn", k=0), ValueError, "k must be at least 1, got 0"),
    "lid's k": (lambda: get_detector("lid", k=1), ValueError, "k must be at least 2, got 1"),
    "few for k": (lambda: get_detector("knn", k=9).fit(features(0, n=8)), ValueError, "At least 9.*neighbours, got 8"),
    "bandwidth": (lambda: get_detector("kernel-density", bandwidth=0.0), ValueError, "bandwidth must be positive.*0.0"),
    "no spread": (lambda: get_detector("kernel-density").fit(torch.ones(5, 2)), ValueError, "same features, so distances have no scale"),
    "one sample": (lambda: get_detector("kernel-density").fit(features(0, n=1)), ValueError, "At least 2.*density, got 1"),
    "no labels": (lambda: Mahalanobis().fit(features(0)), ValueError, r"call fit\(features, labels\)"),
    "few of a class": (lambda: Mahalanobis().fit(features(0, n=5), torch.tensor([0, 0, 7, 1, 1])), ValueError, r"classes \[7\] have fewer"),
    "no critic": (lambda: get_detector("critic", critic=None), TypeError, "critic must be a callable.*NoneType"),
    "critic's shape": (lambda: get_detector("critic", critic=lambda x: x).score(features(0)), ValueError, r"\(60,\) here, got \(60, 6\)"),
    "bits": (lambda: FeatureSqueezing(ThreatModel(), bits=0), ValueError, "bits must be at least 1"),
    "window": (lambda: FeatureSqueezing(ThreatModel(), size=2), ValueError, "size must be odd.*got 2"),
    "no bounds": (lambda: FeatureSqueezing(ThreatModel(bounds=None)), ValueError, "bounds=None"),
    "no model": (lambda: FeatureSqueezing(ThreatModel()).score(features(0)), RuntimeError, "has no model to run.*model="),
    "list of inputs": (lambda: FeatureSqueezing(ThreatModel(), Nasty(6)).score([features(0)]), TypeError, "one tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_checked(case):
    make, kind, match = SETTINGS[case]
    with pytest.raises(kind, match=match):
        make()


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.covariance", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-wdefense\[detection\]\""):
        Mahalanobis()


@pytest.mark.parametrize("fail_at", [None, 1, 2])
def test_feature_squeezing_leaves_the_model_as_it_was(fail_at):
    model = Nasty(36, fail_at=fail_at)
    inputs, snapshot = torch.rand(8, 1, 6, 6), Snapshot(model)
    kept, detector = inputs.clone(), FeatureSqueezing(ThreatModel(), model)
    with pytest.raises(RuntimeError, match="nasty failure") if fail_at else nullcontext():
        detector.score(inputs)
    snapshot.check()
    assert torch.equal(inputs, kept)
    assert not any(model.seen_modes.values())

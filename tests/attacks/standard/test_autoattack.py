"""AutoAttack as published."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.modules import batch, classifier

from lightning_wdefense.attacks import AutoAttack, ThreatModel, get_attack
from lightning_wdefense.attacks.standard.autoattack import PARTS

LINF = ThreatModel(norm="linf", eps=0.2)


def left(model, attack, inputs, labels):
    """Which samples are still classified correctly."""
    return model(attack(model, inputs, labels)).argmax(1) == labels


def test_the_parts_are_the_published_ones():
    parts = AutoAttack(LINF).parts(10)
    assert [part.name for part in parts] == list(PARTS) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [part.attack for part in parts] == ["APGD", "APGDT", "FAB", "Square"]
    assert [part.options for part in parts] == [
        {"loss": "ce", "steps": 100},
        {"steps": 100},
        {"multi_targeted": True, "steps": 100},
        {"n_queries": 5000},
    ]
    assert all(part.threat == LINF for part in parts)
    model = classifier(1, 8, 8, classes=10)
    for part, steps in zip(parts, (100, 100, 100, None), strict=True):
        built = part._build(model, 10, seed=3)
        assert built.eps == LINF.eps
        assert built.norm == "Linf"
        assert built.n_restarts == 1
        assert built.seed == 3
        assert getattr(built, "steps", None) == steps
    # what torchattacks leaves to its defaults is the standard's
    square = parts[3]._build(model, 10, seed=0)
    assert (square.n_queries, square.p_init, square.loss, square.rescale_schedule) == (5000, 0.8, "margin", True)
    assert parts[0]._build(model, 10, seed=0).thr_decr == 0.75


def test_shorter_on_request():
    parts = AutoAttack(LINF, steps=7, queries=11).parts(10)
    assert [part.options.get("steps") for part in parts] == [7, 7, 7, None]
    assert parts[3].options["n_queries"] == 11


@pytest.mark.parametrize("classes", [2, 3])
def test_apgd_t_is_left_out_below_four_classes(classes):
    model = classifier(1, 6, 6, classes=classes)
    inputs, labels = batch(1, 6, 6, model=model)
    with pytest.warns(UserWarning, match=f"leaves APGD-T out.*has {classes}"):
        adversarial = AutoAttack(LINF, steps=5, queries=20)(model, inputs, labels)
    assert (model(adversarial).argmax(1) != labels).any()
    with pytest.warns(UserWarning, match="leaves APGD-T out"):
        assert [part.name for part in AutoAttack(LINF).parts(classes)] == ["apgd-ce", "fab-t", "square"]


@pytest.mark.parametrize("classes", [4, 5, 12])
def test_no_warning_from_four_classes_on(classes):
    model = classifier(1, 6, 6, classes=classes)
    inputs, labels = batch(1, 6, 6, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoAttack(LINF, steps=5, queries=20)(model, inputs, labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_leaves_no_more_than_any_of_its_parts(digits_cnn, norm):
    _, robust, inputs, labels = digits_cnn
    inputs, labels = inputs[:60], labels[:60]
    threat = ThreatModel(norm=norm, eps=0.2 if norm == "linf" else 0.8)
    both = left(robust, AutoAttack(threat, steps=10, queries=100), inputs, labels)
    for part in PARTS:
        options = {"n_queries": 100} if part == "square" else {"steps": 10}
        alone = left(robust, get_attack(part, threat, **options), inputs, labels)
        # A later part's noise depends on which samples are left to it, and rounding on the machine: a few samples may go either way.
        assert both.sum() <= alone.sum() + (0 if part == "apgd-ce" else 3), part
        if part == "apgd-ce":
            assert not (both & ~alone).any(), "what APGD-CE broke must stay broken"


def test_samples_that_were_wrong_stay_as_they_are():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    wrong = (labels + 1) % 5
    for name, options in (("autoattack", {"steps": 5, "queries": 20}), ("apgd-ce", {}), ("square", {"n_queries": 20})):
        adversarial = get_attack(name, LINF, **options)(model, inputs, wrong)
        torch.testing.assert_close(adversarial, inputs, atol=1e-6, rtol=0)

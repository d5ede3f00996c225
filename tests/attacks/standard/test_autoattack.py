"""AutoAttack as published."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchattacks
from support.modules import batch, classifier

from lightning_wdefense.attacks import APGD, FAB, AutoAttack, Square, ThreatModel, get_attack
from lightning_wdefense.attacks.standard.autoattack import PARTS

LINF = ThreatModel(norm="linf", eps=0.2)


def left(model, attack, inputs, labels):
    """Which samples are still classified correctly."""
    return model(attack(model, inputs, labels)).argmax(1) == labels


def test_the_parts_are_the_published_ones():
    assert AutoAttack(LINF).parts == (
        APGD(LINF, steps=100, loss="ce", restarts=1, rho=0.75),
        APGD(LINF, steps=100, loss="dlr-targeted", restarts=1, rho=0.75, targets=9),
        FAB(LINF, steps=100, targets=9, restarts=1),
        Square(LINF, queries=5000, p_init=0.8, rescale_schedule=False, restarts=1),
    )
    assert [part.name for part in AutoAttack(LINF).parts] == list(PARTS) == ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_shorter_on_request():
    parts = AutoAttack(LINF, steps=7, queries=11, targets=2).parts
    assert [getattr(part, "steps", None) for part in parts] == [7, 7, 7, None]
    assert (parts[3].queries, parts[1].targets, parts[2].targets) == (11, 2, 2)


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_any_number_of_classes(classes):
    model = classifier(1, 6, 6, classes=classes)
    inputs, labels = batch(1, 6, 6, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (AutoAttack(LINF, steps=5, queries=20), *AutoAttack(LINF, steps=10, queries=50).parts[:3]):
            assert (~left(model, part, inputs, labels)).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_leaves_no_more_than_any_of_its_parts(digits_cnn, norm):
    _, robust, inputs, labels = digits_cnn
    inputs, labels = inputs[:60], labels[:60]
    threat = ThreatModel(norm=norm, eps=0.2 if norm == "linf" else 0.8)
    whole = AutoAttack(threat, steps=10, queries=100)
    both = left(robust, whole, inputs, labels)
    for part in whole.parts:
        alone = left(robust, part, inputs, labels)
        # A later part's noise depends on which samples are left to it, and rounding on the machine: a few samples may go either way.
        assert both.sum() <= alone.sum() + (0 if part.name == "apgd-ce" else 3), part
        if part.name == "apgd-ce":
            assert not (both & ~alone).any(), "what APGD-CE broke must stay broken"


def test_samples_that_were_wrong_stay_as_they_are():
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    wrong = (labels + 1) % 5
    for attack in (AutoAttack(LINF, steps=5, queries=20), APGD(LINF), FAB(LINF), Square(LINF, queries=20)):
        torch.testing.assert_close(attack(model, inputs, wrong), inputs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_verdicts_are_those_of_torchattacks_parts(digits_cnn, norm):
    """In short: both stop where the other does, on all but a sample or two on the edge."""
    _, robust, inputs, labels = digits_cnn
    x, y = inputs[:60], labels[:60]
    threat = ThreatModel(norm=norm, eps=0.2 if norm == "linf" else 0.8)
    common = {"norm": "Linf" if norm == "linf" else "L2", "eps": threat.eps, "seed": 0}
    theirs = torch.ones(len(y), dtype=torch.bool)
    for attack in (
        torchattacks.APGD(robust, steps=30, **common),
        torchattacks.APGDT(robust, steps=30, **common),
        torchattacks.Square(robust, n_queries=100, resc_schedule=False, **common),
    ):
        theirs &= robust(attack(x, y)).argmax(1) == y
    ours = left(robust, AutoAttack(threat, steps=30, queries=100), x, y)
    assert 0.2 < theirs.float().mean() < 0.9, "too easy or too hard to show anything"
    assert (ours != theirs).sum() <= 1


def test_dense_labels_leave_fab_out():
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3, padding=1)
    inputs = torch.rand(4, 3, 6, 6)
    labels = model(inputs).argmax(1)
    labels[:, 0] = -100
    with pytest.warns(UserWarning, match="leaves FAB-T out"):
        found = AutoAttack(LINF, steps=10, queries=30)(model, inputs, labels)
    known = labels != -100
    share = ((model(found).argmax(1) != labels) & known).sum() / known.sum()
    assert share > 0.5
    for attack in (APGD(LINF, steps=10), APGD(LINF, steps=10, loss="dlr-targeted"), Square(LINF, queries=50)):
        assert ((model(attack(model, inputs, labels)).argmax(1) != labels) & known).sum() / known.sum() > 0.2


def test_registry():
    assert get_attack("apgd-t", LINF) == APGD(LINF, loss="dlr-targeted")
    assert get_attack("apgd-dlr", LINF) == APGD(LINF, loss="dlr")
    assert get_attack("fab-t", LINF) == get_attack("fab", LINF) == FAB(LINF)

"""APGD, FAB and Square, each against an outside truth."""

from __future__ import annotations

import math

import pytest
import torch
import torchattacks
from support.modules import batch, classifier
from torch import nn

from lightning_wdefense.attacks import APGD, FAB, Square, ThreatModel
from lightning_wdefense.attacks.labels import likeliest_wrong
from lightning_wdefense.attacks.standard.apgd import checkpoints
from lightning_wdefense.attacks.standard.dlr import dlr, targeted_dlr
from lightning_wdefense.attacks.standard.hyperplane import shortest_move
from lightning_wdefense.attacks.standard.windows import wave, window_size
from lightning_wdefense.attacks.threat import Box

norms = pytest.mark.parametrize("norm", ["linf", "l2"])
THREATS = {"linf": ThreatModel(eps=0.2), "l2": ThreatModel("l2", 0.8)}
NAMES = {"linf": "Linf", "l2": "L2"}


def counting(model):
    """The model, and how many samples each of its passes had."""
    seen = []

    def run(x):
        seen.append(len(x))
        return model(x)

    return run, seen


# --- APGD


@norms
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_leaves_what_torchattacks_leaves(digits_cnn, norm, loss):
    _, robust, inputs, labels = digits_cnn
    x, y = inputs[:100], labels[:100]
    threat = THREATS[norm]
    theirs = torchattacks.APGD(robust, norm=NAMES[norm], eps=threat.eps, steps=40, loss=loss, seed=0)(x, y)
    ours = APGD(threat, steps=40, loss=loss)(robust, x, y)
    left = [(robust(each).argmax(1) == y).sum() for each in (ours, theirs)]
    assert abs(left[0] - left[1]) <= 1
    assert 20 < left[1] < 90, "too easy or too hard to show anything"


@norms
def test_apgd_solves_a_linear_model(norm):
    """Whose loss is largest at the end of the ball: no step is wrong, and the last is there."""
    torch.manual_seed(0)
    model = nn.Linear(20, 2, bias=False)
    x = torch.rand(6, 20)
    y = model(x).argmax(1)
    threat = ThreatModel(
        norm, 0.001, bounds=None
    )  # too small to fool, so that the point of the largest loss is returned
    found = APGD(threat, steps=20)(model, x, y)
    normal = model.weight[1 - y] - model.weight[y]
    gain = ((found - x) * normal).sum(1)
    best = threat.eps * (normal.abs().sum(1) if norm == "linf" else normal.norm(dim=1))
    torch.testing.assert_close(gain, best, rtol=1e-2, atol=0)


def test_the_checkpoints_are_the_published_ones():
    found = checkpoints(100)
    assert list(found) == [22, 41, 57, 70, 80, 87, 93, 99]  # 0.22, then shorter by 0.03 each time, at least 0.06
    assert list(found.values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoints(1) == {1: 1}


def test_a_lost_sample_leaves_and_the_rest_go_on(digits_cnn):
    plain, _, inputs, labels = digits_cnn
    run, seen = counting(plain)
    APGD(ThreatModel(eps=0.15), steps=30)(run, inputs[:60], labels[:60])
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert seen[-1] < seen[1] / 2
    for attack in (FAB(ThreatModel(eps=0.15), steps=30, targets=1), Square(ThreatModel(eps=0.3), queries=60)):
        run, seen = counting(plain)
        attack(run, inputs[:60], labels[:60])
        assert seen[-1] < seen[1] / 2, attack


def test_a_step_costs_one_pass(digits_cnn):
    """On samples that stay: the clean inputs, the start, and the point after each step."""
    _, robust, inputs, labels = digits_cnn
    right = (robust(inputs).argmax(1) == labels).nonzero().squeeze(1)[:4]
    tiny = ThreatModel(eps=1e-4)
    for attack, passes in (
        (APGD(tiny, steps=9), 11),
        (Square(tiny, queries=9), 11),
        (FAB(tiny, steps=9, targets=1), 20),
    ):
        run, seen = counting(robust)
        attack(run, inputs[right], labels[right])
        assert len(seen) == passes, attack


def test_dlr_does_not_heed_shift_and_scale():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 6
    order = likeliest_wrong(logits, labels, 3)
    for loss in (lambda z: dlr(z, labels), lambda z: targeted_dlr(z, labels, order[:, 1])):
        torch.testing.assert_close(loss(3 * logits + 5), loss(logits))
    ranked = logits.sort(1, descending=True)
    other = torch.where(ranked.indices[:, 0] == labels, ranked.values[:, 1], ranked.values[:, 0])
    true = logits.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(dlr(logits, labels), (other - true) / (ranked.values[:, 0] - ranked.values[:, 2]))
    target = logits.gather(1, order[:, 1:2])[:, 0]
    divisor = ranked.values[:, 0] - (ranked.values[:, 2] + ranked.values[:, 3]) / 2
    torch.testing.assert_close(targeted_dlr(logits, labels, order[:, 1]), (target - true) / divisor)
    assert not (order == labels[:, None]).any()


# --- FAB


@norms
@pytest.mark.parametrize("classes", [2, 4])
def test_fab_finds_the_closest_point_of_a_linear_model(norm, classes):
    torch.manual_seed(0)
    model = nn.Linear(12, classes)
    x = torch.rand(16, 12)
    y = model(x).argmax(1)
    found = FAB(ThreatModel(norm, 50.0, bounds=None), steps=40, early_exit=False)(model, x, y)
    assert (model(found).argmax(1) != y).all()
    z = model(x)
    normals = model.weight[y][:, None] - model.weight
    lead = z.gather(1, y[:, None]) - z
    dual = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
    distances = (lead / dual).scatter(1, y[:, None], math.inf).amin(1)
    length = ThreatModel(norm).ball.length(found - x)
    assert (length >= distances * (1 - 1e-4)).all()
    torch.testing.assert_close(length, distances, rtol=0.01, atol=0)


@norms
def test_fab_leaves_what_torchattacks_leaves(digits_cnn, norm):
    _, robust, inputs, labels = digits_cnn
    x, y = inputs[:60], labels[:60]
    threat = THREATS[norm]
    theirs = torchattacks.FAB(robust, norm=NAMES[norm], eps=threat.eps, steps=15, multi_targeted=True, n_classes=10)(
        x, y
    )
    ours = FAB(threat, steps=15)(robust, x, y)
    left = [(robust(each).argmax(1) == y).sum() for each in (ours, theirs)]
    assert abs(left[0] - left[1]) <= 2


@norms
@pytest.mark.parametrize("boxed", [True, False])
def test_the_shortest_move_is_the_shortest(norm, boxed):
    """Against a fine search over how far each coordinate goes."""
    torch.manual_seed(0)
    x, w = torch.rand(30, 9, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    w[:, 0] = 0
    gap = torch.randn(30, dtype=torch.float64) * 0.5
    low, high = (torch.zeros_like(x), torch.ones_like(x)) if boxed else (x - 100, x + 100)
    box = Box(low, high) if boxed else Box(None, None)
    move = shortest_move(x, w * 1e-9, gap * 1e-9, box, norm)
    way = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    for i in range(30):
        signed = w[i] * gap[i].sign()
        rate = signed.sign() if norm == "linf" else signed
        steps = torch.minimum(torch.maximum(way[:, None] * rate, low[i] - x[i]), high[i] - x[i])
        closed = steps @ signed
        if closed[-1] < gap[i].abs():
            continue
        best = steps[(closed >= gap[i].abs()).nonzero()[0, 0]]
        torch.testing.assert_close(move[i], best, atol=1e-3, rtol=1e-3)


# --- Square


@norms
def test_square_finds_what_a_random_search_can(digits_cnn, norm):
    plain, _, inputs, labels = digits_cnn
    x, y = inputs[:60], labels[:60]
    threat = THREATS[norm]
    theirs = torchattacks.Square(plain, norm=NAMES[norm], eps=threat.eps, n_queries=200, resc_schedule=False, seed=0)(
        x, y
    )
    ours = Square(threat, queries=200)(plain, x, y)
    left = [(plain(each).argmax(1) == y).float().mean() for each in (ours, theirs)]
    assert left[0] <= left[1] + 0.08
    assert left[0] < 0.6


def test_squares_windows_shrink_by_the_schedule():
    square = Square(ThreatModel(), queries=5000)
    assert [square.share(query) for query in (0, 10, 11, 51, 4999)] == [0.8, 0.8, 0.4, 0.2, 0.8 / 128]
    assert Square(ThreatModel(), queries=5000, rescale_schedule=True).share(4999) == 0.8 / 512
    assert window_size(0.8, 28, 28, odd=False) == (25, 25)
    assert window_size(0.001, 28, 28, odd=True) == (3, 3)
    assert window_size(0.8, 1, 30, odd=False) == (1, 25)
    assert window_size(0.8, 1, 1, odd=True) == (1, 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (3, 3), (7, 7), (2, 3)])
def test_a_wave_has_length_one_and_two_signs(height, width):
    for upright in (True, False):
        found = wave(height, width, upright=upright, like=torch.zeros(()))
        assert found.shape == (height, width)
        torch.testing.assert_close(found.norm(), torch.tensor(1.0))
        assert found.max() > 0
        assert (found.min() < 0) == (height * width > 1)


def test_square_uses_the_whole_ball_in_l2():
    model = classifier(3, 8, 8)
    x, y = batch(3, 8, 8, model=model)
    threat = ThreatModel("l2", 0.1, bounds=None)  # too small to fool, without bounds to lose length at
    found = Square(threat, queries=30)(model, x, y)
    torch.testing.assert_close(threat.ball.length(found - x), torch.full((len(x),), 0.1), rtol=1e-4, atol=0)

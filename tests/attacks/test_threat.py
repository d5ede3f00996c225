"""Units, boxes and balls."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from support.modules import batch, classifier

from lightning_wdefense.attacks import FGSM, PGD, ThreatModel
from lightning_wdefense.attacks.norms import BALLS

MEAN, STD = (0.2, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 2, 2)])
def test_units_round_trip(shape):
    threat = ThreatModel(mean=MEAN, std=STD)
    data = torch.rand(shape, dtype=torch.float64)
    mean, std = (torch.tensor(s, dtype=torch.float64).view(1, 3, *[1] * (len(shape) - 2)) for s in (MEAN, STD))
    torch.testing.assert_close(threat.to_model(data), (data - mean) / std)
    torch.testing.assert_close(threat.to_data(threat.to_model(data)), data)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 2, 3)])
def test_balls_of_no_samples(norm, shape):
    """A rank of a sharded model may have none left, and goes on with the others."""
    ball, nothing = BALLS[norm], torch.zeros(shape)
    assert ball.length(nothing).shape == ball.dual(nothing).shape == (0,)
    for found in (
        ball.steepest(nothing.clone()),
        ball.project(nothing, 1.0),
        ball.project(nothing, torch.zeros(0)),
        ball.uniform(nothing, 1.0, torch.Generator()),
    ):
        assert found.shape == shape


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 7), (4, 2, 5)])
def test_one_value_serves_all_channels(shape):
    threat = ThreatModel(mean=0.5, std=0.25)
    data = torch.rand(shape)
    assert threat.to_model(data).shape == shape
    torch.testing.assert_close(threat.to_model(data), (data - 0.5) / 0.25)
    assert ThreatModel(mean=0.5) == ThreatModel(mean=[0.5]) == ThreatModel(mean=torch.tensor([0.5]))


def test_is_a_value():
    threat = ThreatModel(mean=np.array([0.5, 0.25]), std=torch.tensor([0.5, 1.0]), eps=np.float64(0.1), bounds=[0, 1])
    assert threat == ThreatModel(mean=(0.5, 0.25), std=[0.5, 1.0], eps=0.1)
    assert hash(threat) == hash(ThreatModel(mean=(0.5, 0.25), std=[0.5, 1.0], eps=0.1))
    assert pickle.loads(pickle.dumps(threat)) == copy.deepcopy(threat) == threat
    assert eval(repr(threat)) == threat
    assert threat.with_eps(0.3).eps == 0.3
    assert threat.with_eps(0.3).mean == threat.mean
    assert threat.eps == 0.1


def test_conversion_first_met_in_inference_mode_serves_training():
    """The cached statistics must not be inference tensors."""
    threat = ThreatModel(mean=0.123, std=0.456)
    with torch.inference_mode():
        threat.to_model(torch.rand(2, 3))
    inputs = torch.rand(2, 3, requires_grad=True)
    (threat.to_model(inputs) * inputs).sum().backward()
    assert inputs.grad is not None


def test_a_few_strays_widen_the_box_for_themselves_alone():
    """Augmentation overshoots: those values stay legal, all others keep the bounds."""
    model = classifier(2, 12, 12)
    inputs, labels = batch(2, 12, 12)
    inputs.clamp_(0.02, 0.98)
    inputs[0, 0, 0, 0], inputs[1, 1, 3, 3] = 1.5, -0.7
    stray = (inputs < 0) | (inputs > 1)
    with pytest.warns(UserWarning, match="A few input values lie outside") as caught:
        adversarial = PGD(ThreatModel(eps=0.3))(model, inputs, labels)
    assert caught[0].filename == __file__, "the warning must point at the caller"
    assert adversarial[~stray].min() >= 0
    assert adversarial[~stray].max() <= 1
    assert adversarial[0, 0, 0, 0] <= 1.5
    assert adversarial[1, 1, 3, 3] >= -0.7
    assert (adversarial - inputs).abs().max() <= 0.3 + 1e-6
    assert (adversarial - inputs).abs()[~stray].max() > 0.29


def test_rounding_is_no_stray():
    """Normalising and storing in low precision puts 0 and 1 slightly outside."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        threat = ThreatModel(mean=MEAN, std=STD, eps=0.1)
        data = torch.rand(64, 3, 4, 4).round()
        inputs = threat.to_model(data).to(dtype)
        model = classifier(3, 4, 4).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FGSM(threat)(model, inputs, torch.zeros(64, dtype=torch.long))


def test_l2_ball_is_per_sample():
    model = classifier(6, scale=6.0)
    inputs, labels = batch(6)
    adversarial = PGD(ThreatModel(norm="l2", eps=0.3, bounds=None))(model, inputs, labels)
    lengths = (adversarial - inputs).norm(dim=1)
    assert (lengths > 0.2).all()
    assert (lengths <= 0.3 + 1e-6).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30])
def test_l2_steps_whatever_the_size_of_the_gradient(magnitude):
    weight = torch.tensor([3.0, 4.0])

    def model(inputs):
        return magnitude * (inputs * weight).sum(1, keepdim=True)

    attack = FGSM(ThreatModel(norm="l2", eps=1.0, bounds=None), loss=lambda outputs, labels: outputs)
    moved = attack(model, torch.zeros(2, 2), None)
    torch.testing.assert_close(moved, torch.tensor([[0.6, 0.8], [0.6, 0.8]]))


def test_what_is_not_a_number_in_the_gradient_does_not_spread():
    """sqrt at 0 has an infinite derivative: that value stays, the others move."""

    def model(inputs):
        return torch.stack([inputs.sum(1) * 0, (inputs.sqrt() * torch.tensor([0.0, 1.0, 1.0])).sum(1)], 1)

    inputs = torch.tensor([[0.0, 0.5, 0.5]])
    adversarial = PGD(ThreatModel(eps=0.1), random_start=False)(model, inputs, torch.tensor([1]))
    assert torch.isfinite(adversarial).all()
    torch.testing.assert_close(adversarial[:, 1:], torch.tensor([[0.4, 0.4]]))

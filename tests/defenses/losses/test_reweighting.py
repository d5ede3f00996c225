"""Worst-case weights of samples: closed forms, a numerical optimiser, and what they add to a training step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, quiet_trainer
from torch import nn

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense._ranks import ALONE, Ranks
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import SampleReweighting, kl_ball_weights

THREAT = ThreatModel(eps=0.2)
IMAGES, LABELS = digits()[0][:32], digits()[1][:32]


def divergence(weights):
    return float(torch.special.xlogy(weights, weights).sum() + math.log(len(weights)))


@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5, 1.2])
def test_the_weights_are_the_worst_in_the_ball(radius):
    """Against a numerical optimiser."""
    losses = torch.tensor([0.2, 1.5, 0.9, 0.3, 1.4], dtype=torch.float64)
    found = minimize(
        lambda w: -w @ losses.numpy(),
        np.full(5, 0.2),
        bounds=[(1e-12, 1)] * 5,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "ineq", "fun": lambda w: radius - np.sum(w * np.log(5 * w))},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    np.testing.assert_allclose(kl_ball_weights(losses, radius).numpy(), found.x, atol=1e-4)


def test_closed_forms():
    losses = torch.tensor([0.0, 1.0])
    for larger in (0.5001, 0.6, 0.9, 1 - 1e-9):  # two samples: the divergence gives the weight
        radius = divergence(torch.tensor([1 - larger, larger], dtype=torch.float64))
        assert float(kl_ball_weights(losses, radius)[1]) == pytest.approx(larger, rel=1e-8)
    assert kl_ball_weights(torch.rand(7), 0.0).tolist() == [1 / 7] * 7
    assert kl_ball_weights(torch.tensor([3.0]), 0.5).tolist() == [1]
    assert kl_ball_weights(torch.full((4,), 2.0), 0.7).tolist() == [0.25] * 4
    ties = torch.tensor([1.0, 5.0, 5.0, 0.0])
    for radius in (math.log(2) + 1e-9, 9.0):  # the ball contains the largest ones' own distribution
        assert kl_ball_weights(ties, radius).tolist() == [0, 0.5, 0.5, 0]
    assert kl_ball_weights(torch.tensor([0.0, torch.nan]), 0.1).isnan().all()


@pytest.mark.parametrize("radius", [1e-10, 1e-4, 0.1, 2.0, 4.5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_radius_is_spent_and_units_do_not_matter(radius, scale):
    losses = torch.rand(128, generator=torch.Generator().manual_seed(0)).double()
    weights = kl_ball_weights(scale * losses + scale, radius)
    assert float(weights.sum()) == pytest.approx(1)
    assert divergence(weights) == pytest.approx(radius, rel=1e-4)
    torch.testing.assert_close(weights, kl_ball_weights(losses, radius), rtol=1e-5, atol=0)
    assert (weights[losses.argsort()].diff() >= 0).all()


def test_a_penalty():
    losses = torch.tensor([0.1, 2.0, 1.0])
    torch.testing.assert_close(SampleReweighting(temperature=0.5).weights(losses), (2 * losses.double()).softmax(0))


@pytest.mark.parametrize("name", ["pgd-at", "trades"])
def test_the_step_minimises_the_reweighted_cross_entropy(name):
    """Of the outputs that the step saw: adversarial or clean ones."""
    torch.manual_seed(0)
    model = DigitsClassifier()
    reweighting = SampleReweighting(radius=0.3)
    plain = Recipe.named(name, THREAT).bind(model)(IMAGES, LABELS)
    output = Recipe.named(name, THREAT, reweighting=reweighting).bind(model)(IMAGES, LABELS)
    seen = output.adversarial_outputs if name == "pgd-at" else output.clean_outputs
    losses = F.cross_entropy(seen, LABELS, reduction="none")
    weights = kl_ball_weights(losses, 0.3).float()
    expected = (weights * losses).sum() + (plain.loss - losses.mean())  # other terms stay
    torch.testing.assert_close(output.loss, expected)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(output.loss, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert float(output.logs["effective_samples"]) == pytest.approx(float(1 / weights.square().sum()), rel=1e-5)
    assert float(output.logs["max_weight"]) == pytest.approx(32 * float(weights.max()), rel=1e-5)
    assert plain.logs.keys() == output.logs.keys() - {"reweighting", "effective_samples", "max_weight"}


def test_a_radius_of_zero_changes_nothing():
    def weights(reweighting):
        torch.manual_seed(0)
        module = DigitsClassifier()
        recipe = Recipe.named("pgd-at", THREAT, warmup_epochs=0, reweighting=reweighting)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=3, callbacks=[WassersteinDefense(recipe)])
        trainer.fit(module, digits_loaders(shuffle=False)[0])
        return torch.cat([each.detach().flatten() for each in module.parameters()])

    plain = weights(None)
    assert torch.equal(weights(SampleReweighting(radius=0.0)), plain)
    assert (weights(SampleReweighting(radius=0.5)) - plain).abs().max() > 1e-4


def test_pixels_are_weighted_with_their_sample():
    logits, masks = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 5, 5))
    masks[0, 0] = -100
    losses = SampleReweighting(radius=0.1)._losses(logits, masks)
    torch.testing.assert_close(losses.mean(), F.cross_entropy(logits, masks))
    added, _ = SampleReweighting(radius=0.0).added(logits, masks, ALONE)
    assert float(added) == 0


def test_regression_with_losses_of_ones_own():
    reweighting = SampleReweighting(radius=0.2, loss=lambda outputs, targets: (outputs[:, 0] - targets).square())
    attack = PGD(THREAT, loss=lambda outputs, targets: (outputs[:, 0] - targets).square())
    model, targets = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), torch.rand(32)
    recipe = Recipe(attack, reweighting=reweighting, task_loss=lambda z, y: (z[:, 0] - y).square().mean())
    output = recipe.bind(model)(IMAGES, targets)
    losses = (output.adversarial_outputs[:, 0] - targets).square()
    torch.testing.assert_close(output.loss, (kl_ball_weights(losses, 0.2).float() * losses).sum())


class Together(Ranks):
    """Two ranks, of which the other one has these losses, without processes."""

    other = torch.tensor([1.0, 4.0, 2.0])

    def row_counts(self, rows):
        return [len(rows), 3]

    def gather(self, rows, sizes):
        return torch.cat([rows, self.other.to(rows)])


def test_all_ranks_share():
    losses = torch.tensor([3.0, 0.5])
    reweighting = SampleReweighting(radius=0.3, loss=lambda outputs, labels: outputs)
    added, measured = reweighting.added(losses, None, Together(2, 0))
    weights = kl_ball_weights(torch.cat([losses, Together.other]), 0.3)
    # Data-parallel training averages the ranks' losses.
    assert float(added) / 2 == pytest.approx(float(((weights - 0.2)[:2] * losses).sum()), rel=1e-5)
    assert float(measured["max_weight"]) == pytest.approx(5 * float(weights.max()))


class Regressor(DigitsClassifier):
    def training_step(self, batch, batch_idx):
        return self(2 * batch[0]).square().mean()  # nothing of classes, and no plain pass


def test_errors():
    for options, says in (
        ({}, "either radius= .* or temperature="),
        ({"radius": 0.1, "temperature": 1.0}, "either radius= .* or temperature="),
        ({"radius": -0.1}, "radius must be finite and not negative"),
        ({"radius": math.inf}, "radius must be finite"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=says):
            SampleReweighting(**options)
    with pytest.raises(ValueError, match=r"shape \(N,\) with N at least 1, got \(2, 2\)"):
        kl_ball_weights(torch.rand(2, 2), 0.1)
    with pytest.raises(ValueError, match="radius must not be negative"):
        kl_ball_weights(torch.rand(2), math.nan)
    ball = SampleReweighting(radius=0.1)
    for outputs, labels in ((None, LABELS), (torch.rand(32, 10), torch.rand(32)), (torch.rand(32, 10), LABELS + 10)):
        with pytest.raises(ValueError, match=r"cross-entropy of each sample, which cannot be computed.*loss=\.\.\."):
            ball.added(outputs, labels, ALONE)
    with pytest.raises(ValueError, match=r"one loss for each sample, shape \(N,\), got \(\)"):
        SampleReweighting(radius=0.1, loss=lambda z, y: z.mean()).added(torch.rand(4, 2), None, ALONE)
    with pytest.raises(ValueError, match="attack=None"):
        Recipe(None, "clean", reweighting=ball)
    recipe = Recipe.named("pgd-at", THREAT, reweighting=ball)
    trainer = quiet_trainer(max_epochs=1, callbacks=[WassersteinDefense(recipe)])
    with pytest.raises(ValueError, match="do not appear to be classes of the model's outputs"):
        trainer.fit(Regressor(), digits_loaders()[0])

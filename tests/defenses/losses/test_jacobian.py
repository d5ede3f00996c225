"""The Jacobian term against the whole Jacobian, its units, and models that cannot be differentiated twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.lightning_modules import DigitsClassifier, digits
from torch import nn
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_wdefense import Recipe, ThreatModel
from lightning_wdefense.defenses.losses.jacobian import (
    JacobianError,
    random_directions,
    slopes_along,
    squared_slope,
    transport_directions,
)
from lightning_wdefense.transport import sliced_wasserstein

THREAT = ThreatModel(eps=0.2)
IMAGES, LABELS = digits()[0][:16], digits()[1][:16]


def whole(net, inputs):
    """The Jacobian of each sample, ``(N, K, D)``."""
    return vmap(jacrev(lambda one: net(one[None])[0]))(inputs).flatten(2)


def test_random_directions_estimate_the_frobenius_norm():
    torch.manual_seed(0)
    net = DigitsClassifier().net
    values = IMAGES[:4].clone().requires_grad_()
    features, generator = net(values), torch.Generator().manual_seed(0)
    found = [
        squared_slope(slopes_along(features, values, random_directions(features, generator)), features)
        for _ in range(400)
    ]
    expected = whole(net, IMAGES[:4]).square().sum((1, 2)).mean()
    assert float(sum(found) / 400) == pytest.approx(float(expected), rel=0.1)


def test_the_gradient_in_the_weights_is_that_of_the_whole_jacobian():
    torch.manual_seed(0)
    net = DigitsClassifier().net.double()
    values = IMAGES[:4].double().requires_grad_()
    features = net(values)
    directions = random_directions(features, torch.Generator().manual_seed(0))
    term = squared_slope(slopes_along(features, values, directions), features)
    by_hand = 10 * torch.einsum("nk,nkd->nd", directions, whole(net, values.detach())).square().sum(1).mean()
    weights = [weight for weight in net.parameters() if weight.ndim > 1]
    for one, other in zip(torch.autograd.grad(term, weights), torch.autograd.grad(by_hand, weights), strict=True):
        torch.testing.assert_close(one, other)


def test_transport_moves_towards_the_matched_sample():
    clean = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    moved = (clean + torch.tensor([0.0, 2.0])).requires_grad_()
    value = 0.5 * sliced_wasserstein(clean, moved, n_projections=2).square()
    torch.testing.assert_close(transport_directions(value, moved), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    stays = clean.clone().requires_grad_()
    assert (transport_directions(0.5 * sliced_wasserstein(clean, stays).square(), stays) == 0).all()


def jacobian_of(threat, model, inputs, **changes):
    recipe = Recipe.named("otjr", threat, **changes)
    return float(recipe.bind(copy.deepcopy(model))(inputs, LABELS).logs["jacobian"])


@pytest.mark.parametrize("directions", ["transport", "random"])
def test_it_is_in_data_units(directions):
    """The same, however the pipeline normalises."""

    class Denormalised(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(0.25 * x + 0.5)

    torch.manual_seed(0)
    model = DigitsClassifier()
    plain = jacobian_of(THREAT, model, IMAGES, jacobian_directions=directions)
    normalised = ThreatModel(eps=0.2, mean=0.5, std=0.25)
    found = jacobian_of(normalised, Denormalised(model), (IMAGES - 0.5) / 0.25, jacobian_directions=directions)
    assert found == pytest.approx(plain, rel=1e-3)


def test_training_with_it_lowers_it():
    def after(weight):
        torch.manual_seed(0)
        model = DigitsClassifier()
        defense = Recipe.named("otjr", THREAT, jacobian_weight=weight).bind(model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            defense(IMAGES, LABELS).loss.backward()
            optimizer.step()
        return float(whole(model.net, IMAGES).square().sum((1, 2)).mean())

    assert after(0.1) < 0.7 * after(1e-6)


def test_a_model_that_works_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10))
    kept = IMAGES.clone()
    Recipe.named("otjr", THREAT).bind(net)(IMAGES, LABELS).loss.backward()
    assert torch.equal(IMAGES, kept)
    assert net[2].weight.grad.abs().sum() > 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class DifferentiableOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(Once.apply(self.hidden(x.flatten(1))))


class Attends(nn.Module):
    """With fused attention, whose gradient has no derivative."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(64, 10)

    def forward(self, x):
        rows = self.hidden(x)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.head(F.scaled_dot_product_attention(rows, rows, rows).flatten(1))


@pytest.mark.parametrize("model", [DifferentiableOnce, Attends])
def test_a_model_without_double_backward(model):
    with pytest.raises(JacobianError, match=r"double backward.*once_differentiable.*jacobian_weight=0"):
        Recipe.named("otjr", THREAT).bind(model())(IMAGES, LABELS)


def test_errors():
    with pytest.raises(JacobianError, match="do not depend differentiably on the inputs"):
        slopes_along(torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True), torch.ones(2, 3))
    for name, changes, says in (
        ("trades", {"jacobian_weight": 0.1}, "set sees='adversarial'"),
        ("pgd-at", {"jacobian_weight": 0.1}, "weight=0: set weight="),
        ("otjr", {"jacobian_weight": -1.0}, "jacobian_weight must not be negative"),
        ("otjr", {"jacobian_directions": "all"}, 'must be "transport" or "random"'),
    ):
        with pytest.raises(ValueError, match=says):
            Recipe.named(name, THREAT, **changes)


def test_random_directions_need_no_discrepancy():
    torch.manual_seed(0)
    recipe = Recipe.named("pgd-at", THREAT, jacobian_weight=0.1, jacobian_directions="random")
    output = recipe.bind(DigitsClassifier())(IMAGES, LABELS)
    torch.testing.assert_close(output.loss, output.logs["task_loss"] + 0.1 * output.logs["jacobian"])
    assert "discrepancy" not in output.logs


def test_a_compiled_model():
    """Compiled code has no double backward: the pass that is differentiated twice runs eagerly."""
    torch.manual_seed(0)
    model = DigitsClassifier()
    expected = jacobian_of(THREAT, model, IMAGES)
    compiled = torch.compile(model, backend="aot_eager")
    output = Recipe.named("otjr", THREAT).bind(compiled)(IMAGES, LABELS)
    output.loss.backward()
    assert float(output.logs["jacobian"]) == pytest.approx(expected, rel=1e-3)

"""Views of a model: straight through what has no gradient, averaged, rescaled, and logits from probabilities."""

from __future__ import annotations

import pytest
import torch
from audit.zoo.parts import After, Before
from torch import nn

from lightning_wdefense import ThreatModel
from lightning_wdefense.audit.views.base import Logits, activation_of
from lightning_wdefense.audit.views.noise import Averaged, Blurred, FixedNoise, Rescaled
from lightning_wdefense.audit.views.straight_through import StraightThrough


def without_grad(x):
    with torch.no_grad():
        return (x * 8).round() / 8


@torch.no_grad()
def decorated(x):
    return x * 1.5


def in_place(x):
    y = x * 8
    y.round_()
    return y / 8


# What stands before the model, which operations are passed, and the slope of the whole with respect to x.
PASSED = {
    "identity": (lambda x: x, set(), 1.0),
    "round": (lambda x: (x * 8).round() / 8, {"round"}, 1.0),
    "in place": (in_place, {"round"}, 1.0),
    "floor": (lambda x: torch.floor(x * 8) / 8, {"floor"}, 1.0),
    "sign": (lambda x: (x - 0.5).sign(), {"sign"}, 1.0),
    "bytes": (lambda x: (x * 255).byte().float() / 255, {"uint8"}, 1.0),
    "to integers": (lambda x: (x * 4).to(torch.int32).to(torch.float32) / 4, {"int32"}, 1.0),
    "by a type": (lambda x: (x * 4).type(torch.int64).type_as(x) / 4, {"int64"}, 1.0),
    "detach": (lambda x: x.detach() * 2, {"detach"}, 2.0),
    "data": (lambda x: x.data * 2, {"detach"}, 2.0),
    "no_grad": (without_grad, {"no_grad", "round"}, 1.0),
    "no_grad as a decorator": (decorated, {"no_grad"}, 1.5),
    "greater": (lambda x: (x > 0.5).float(), {"comparison"}, 1.0),
    "less": (lambda x: (0.3 * x < 0.5).to(x.dtype), {"comparison"}, -0.3),
    "an estimator of its own": (lambda x: x + ((x * 8).round() / 8 - x).detach(), {"round", "detach"}, 1.0),
}


@pytest.mark.parametrize("name", PASSED)
def test_straight_through(name):
    function, met, slope = PASSED[name]
    torch.manual_seed(0)
    last = nn.Linear(4, 3)
    model = Before(function, last)
    view = StraightThrough(Logits(model))
    x = torch.rand(5, 4, requires_grad=True)
    logits = view(x)
    torch.testing.assert_close(logits, model(x))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(gradient, (slope * last.weight[0]).expand(5, 4))
    assert view.met == met
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.clamp(0, 1), "clamp"),
        (lambda x: torch.clamp(x, min=0, max=1), "clamp"),
        (lambda x: torch.clamp(x, torch.zeros(4), max=torch.ones(4)), "clamp"),
        (lambda x: (1 * x).clamp_(0.0, 1.0), "clamp"),
        (lambda x: x.clip(0, 1), "clip"),
        (lambda x: nn.functional.hardtanh(x, 0.0, 1.0), "hardtanh"),
        (nn.Hardtanh(0.0, 1.0), "hardtanh"),
        (lambda x: nn.functional.hardtanh(1 * x, 0.0, 1.0, inplace=True), "hardtanh"),
    ],
)
def test_values_at_a_bound_have_a_gradient(function, name):
    last = nn.Linear(4, 3)
    view = StraightThrough(Logits(Before(function, last)))
    x = torch.tensor([[0.0, 1.0, 0.3, -0.2]], requires_grad=True)
    logits = view(x)
    torch.testing.assert_close(logits, Before(function, last)(x))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    torch.testing.assert_close(gradient, last.weight[:1] * torch.tensor([1, 1, 1, 0]))
    assert view.met == {name}
    view.met.clear()
    assert torch.autograd.grad(view(x * 0.9 + 0.05)[:, 0].sum(), x)[0].ne(0).sum() == 3
    assert not view.met


@pytest.mark.parametrize("bounds", [{"min": 0}, {"max": 1}])
def test_one_bound(bounds):
    view = StraightThrough(Logits(Before(lambda x: x.clamp(**bounds), nn.Identity())))
    x = torch.tensor([[0.0, 1.0, 0.3, 2.0, -2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(view(x).sum(), x)
    assert gradient.tolist() == [[1, 1, 1, 0 if "max" in bounds else 1, 0 if "min" in bounds else 1]]


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.from_numpy(x.detach().numpy().round()), lambda x: torch.ones(256, 4)[(x[:, 0] * 255).long()]],
    ids=["numpy", "index"],
)
def test_what_cannot_be_passed_has_gradients_of_zero(function):
    x = torch.rand(5, 4, requires_grad=True)
    logits = StraightThrough(Logits(Before(function, nn.Linear(4, 3))))(x)
    assert (torch.autograd.grad(logits.sum(), x)[0] == 0).all()


def test_an_error_of_the_model_is_the_users():
    def broken(x):
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        StraightThrough(Logits(Before(broken, nn.Linear(4, 3))))(torch.rand(2, 4, requires_grad=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_become_logits_again(kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 3), torch.rand(6, 4)
    model = After(linear, lambda z: z.softmax(1) if kind == "softmax" else z.sigmoid())
    assert activation_of(model(x.requires_grad_())) == kind
    logits = Logits(model, kind)(x)
    expected = linear(x).log_softmax(1) if kind == "softmax" else linear(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_logits_stay():
    x = torch.rand(6, 4)
    assert activation_of(nn.Linear(4, 3)(x)) is None
    assert activation_of(torch.rand(6, 3)) is None  # by chance in [0, 1]


def noisy(x):
    return x + 0.3 * torch.randn_like(x)


def test_the_mean_over_draws():
    torch.manual_seed(0)
    model, x = Before(noisy, nn.Linear(4, 3)), torch.rand(5, 4)
    view = Averaged(Logits(model), 2000)
    expected = torch.stack([model(x).softmax(1) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(view(x).softmax(1), expected, atol=0.02, rtol=0)


def test_fixed_noise_is_fixed_and_leaves_the_random_state():
    view, x = FixedNoise(Logits(Before(noisy, nn.Linear(4, 3))), 5), torch.rand(5, 4)
    state = torch.get_rng_state()
    first = view(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(view(x), first)


def test_blurring_makes_slopes_of_steps():
    steps = Before(lambda x: (x > 0.5).float() + 0 * x, nn.Identity())
    view = Blurred(Logits(steps), ThreatModel(eps=1.0), 0.2, draws=4000, seed=0)
    below, above = view(torch.tensor([[0.4, 0.0]])).softmax(1)[0, 0], view(torch.tensor([[0.6, 0.0]])).softmax(1)[0, 0]
    likely, unlikely = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).softmax(1)[:, 0]
    assert below == pytest.approx(float(0.25 * likely + 0.75 * unlikely), abs=0.01)
    assert above == pytest.approx(float(0.75 * likely + 0.25 * unlikely), abs=0.01)


def test_rescaled_logits_have_gradients():
    torch.manual_seed(0)
    x, labels = torch.rand(20, 4, requires_grad=True), torch.zeros(20, dtype=torch.long)
    sharp = Logits(After(nn.Linear(4, 3), lambda z: 1e4 * z))
    labels = sharp(x).argmax(1)
    plain, rescaled = (
        torch.autograd.grad(nn.functional.cross_entropy(view(x), labels), x)[0] for view in (sharp, Rescaled(sharp))
    )
    assert (plain == 0).all(1).float().mean() > 0.5
    assert (rescaled != 0).any(1).all()
    assert torch.equal(sharp(x).argmax(1), Rescaled(sharp)(x).argmax(1))

"""The critic against exact transport, closed forms, singular values and finite differences."""

import copy
import math
import threading
from functools import cache
from typing import get_args

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import one_core_each
from torch import nn

from lightning_wdefense.transport import CriticTraining, WassersteinCritic, critic_distance
from lightning_wdefense.transport.critic.lipschitz import PENALISED, GroupSort, Lipschitz

WAYS = get_args(Lipschitz)
BOUNDED = [way for way in WAYS if way not in PENALISED]
IMAGES = (1, 34, 33)
"""Large enough for convolutions, and odd enough to need padding."""
ROUNDING = 1e-5

slow = pytest.mark.slow
every_way = pytest.mark.parametrize("way", WAYS)
bounded_ways = pytest.mark.parametrize("way", BOUNDED)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(n=24, m=16, shape=(3,), seed=0, shift=1.0):
    draw = rng(seed)
    return torch.randn(n, *shape, generator=draw) + shift, torch.randn(m, *shape, generator=draw)


def trained(way, shape, lr=0.05):
    return trained_once(way, shape, lr)


@cache
def trained_once(way, shape, lr):
    """Trained at a constant rate on clouds that move, so that no weight has come to rest."""
    critic = WassersteinCritic(shape, lipschitz=way)
    training = CriticTraining(critic, lr=lr, max_steps=3)
    for step in range(12):
        x, y = clouds(16, 16, shape, step)
        training.update((1 + step / 6) * x, y)
    return critic


def state_of(training):
    """All that a training is, as a list of tensors."""
    critic, optimizer = training.critic.state_dict(), training.optimizer.state_dict()["state"]
    moments = [value for each in optimizer.values() for value in each.values()]
    return [*critic.values(), *moments, torch.tensor(training.agreement)]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The distance


LEARNING = {"decade's low end": (0.016, 350), "decade's high end": (0.16, 120)}
"""Rates, and how many steps they need."""
QUICK = {
    *((way, 16, "decade's high end") for way in WAYS),
    *zip(WAYS, [2, 128, 128, 2], ["decade's low end", *["decade's high end"] * 3], strict=True),
}


@pytest.mark.parametrize(
    ("way", "dim", "lr", "steps"),
    [
        pytest.param(way, dim, *LEARNING[end], id=f"{way}-{dim}-{end}", marks=[] if (way, dim, end) in QUICK else slow)
        for way in WAYS
        for dim in (2, 16, 128)
        for end in LEARNING
    ],
)
def test_translated_gaussians(way, dim, lr, steps):
    draw, shift = rng(1), torch.ones(dim) * 3 / dim**0.5

    def pair():
        return torch.randn(128, dim, generator=draw) + shift, torch.randn(128, dim, generator=draw)

    found = critic_distance(pair, critic=WassersteinCritic(dim, lipschitz=way), lr=lr, steps=steps)
    assert found.value.item() == pytest.approx(3, rel=0.05)
    # It says how far it may be off, which is what the means of so many Gaussians scatter by.
    batches = steps // 4
    assert found.standard_error.item() == pytest.approx((2 / 128 / batches) ** 0.5, rel=0.5)


SMALL = {
    "translated": lambda x, y: (x + torch.tensor([2.0, 1.0]), y),
    "scaled": lambda x, y: (3 * x, y),
    "crossed pairs": lambda x, y: (x + 3 * signs(x) * torch.tensor([1.0, 0.0]), y + 3 * signs(y) * torch.tensor([0.0, 1.0])),
}  # fmt: skip


def signs(points):
    return (torch.arange(len(points)) % 2 * 2 - 1)[:, None]


@pytest.mark.parametrize(
    ("way", "make"),
    [
        pytest.param(way, make, id=f"{way}-{name}", marks=[] if name == quick else slow)
        for way, quick in zip(WAYS, ["crossed pairs", "translated", "scaled", "crossed pairs"], strict=True)
        for name, make in SMALL.items()
    ],
)
def test_exact_transport_of_small_sets(way, make):
    x, y = make(*clouds(32, 24, (2,), shift=0))
    exact = ot.emd2([], [], ot.dist(x.double().numpy(), y.double().numpy(), metric="euclidean"))
    found = critic_distance(x, y, critic=WassersteinCritic(2, lipschitz=way), steps=250 if way in BOUNDED else 350)
    assert 0.88 * exact < found.value < exact * (1 + ROUNDING if way in BOUNDED else 1.1)
    assert found.standard_error.isnan()
    torch.testing.assert_close(found.value, found.critic.distance(x, y, generator=rng()), rtol=0.08, atol=0)


@bounded_ways
def test_gap_is_never_above_exact_transport(way):
    """Whatever the critic has been trained on."""
    critic = trained(way, (3,))
    for seed in range(20):
        x, y = clouds(8, 6, (3,), seed, shift=seed / 5)
        for one, other in ((x, y), (y, x), (x, x + 1)):
            exact = ot.emd2([], [], ot.dist(one.double().numpy(), other.double().numpy(), metric="euclidean"))
            assert critic.gap(one, other) <= exact * (1 + ROUNDING)


def test_penalty_overshoots_by_what_is_said_and_the_distance_does_not():
    """At the optimum of ``W g - penalty (g - 1)^2`` the slope ``g`` is ``1 + W / 2 penalty``, in units of the points' size."""
    x, y = clouds(512, 512, (1,), shift=0)
    x = y + 2
    critic = WassersteinCritic(1, lipschitz="gradient-penalty", penalty=5.0)
    critic_distance(x, y, critic=critic, steps=200, lr=0.1)
    size = torch.cat([x, y]).std().item()
    assert critic.gap(x, y).item() == pytest.approx(2 * (1 + 2 / size / 10), rel=0.02)
    assert critic.distance(x, y).item() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("penalty", [0.05, 0.5, 5.0])
def test_bounded_gap_pulls_with_a_force_of_one_however_weak_the_penalty(penalty):
    y = torch.randn(128, 4, generator=rng())
    x = (y.roll(1, 0) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    critic = WassersteinCritic(4, lipschitz="gradient-penalty", penalty=penalty)
    critic_distance(x.detach(), y, critic=critic, steps=100, lr=0.1)
    assert critic.gap(x, y).item() > 2 * (1 + 1 / (4 * penalty))
    assert critic.bounded_gap(x, y).item() == pytest.approx(2, rel=0.1)
    (gradient,) = torch.autograd.grad(critic.bounded_gap(x, y), x)
    assert (len(x) * gradient).norm(dim=1).mean().item() == pytest.approx(1, rel=0.1)


@every_way
def test_bounded_gap_is_the_gap_where_there_is_no_overshoot(way):
    critic, points = trained(way, (3,)), clouds()
    untrained = WassersteinCritic(3, lipschitz=way)
    for each in (critic, untrained) if way not in PENALISED else (untrained,):
        torch.testing.assert_close(each.bounded_gap(*points), each.gap(*points), rtol=0, atol=0)


@every_way
def test_scores_fall_towards_the_other_cloud(way):
    """Its gradient is what a model is trained with: for a translation the unit vector along it, at every point."""
    draw = rng(3)
    y, shift = torch.randn(128, 8, generator=draw), torch.linspace(-1, 1, 8)
    x = y.roll(1, 0) + 2 * shift
    critic = critic_distance(x, y, critic=WassersteinCritic(8, lipschitz=way), steps=100, lr=0.1).critic
    points = x.clone().requires_grad_()
    with critic.frozen():
        (gradient,) = torch.autograd.grad(critic.gap(points, y), points)
    assert torch.cosine_similarity(len(x) * gradient, shift[None]).mean() > 0.95
    assert critic(x).mean() > critic(y).mean()


# 1-Lipschitz, always


@pytest.mark.parametrize(
    ("shape", "lr"), [((2,), 1.0), ((16,), 0.16), ((70,), 0.016), ((70,), 1.0), (IMAGES, 0.05)], ids=str
)
@bounded_ways
def test_no_layer_exceeds_one(way, shape, lr):
    critic = trained(way, shape, lr)
    layers = [layer for layer in critic.network.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert len(layers) == (6 if shape == IMAGES else 3)
    for layer in layers:
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())
        assert values.max() < 1 + ROUNDING
        assert (values if way == "orthogonal" else values.max()).min() > 0.985


coordinates = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@bounded_ways
@settings(max_examples=100, deadline=None)
@given(one=coordinates, other=coordinates)
def test_scores_of_two_points(way, one, other):
    one, other = torch.tensor([one]), torch.tensor([other])
    critic = trained(way, (4,), 0.5)
    assert (critic(one) - critic(other)).abs() <= (one - other).norm() + 1e-4


@bounded_ways
def test_scores_of_images(way):
    critic = trained(way, IMAGES)
    images = torch.cat([cloud for seed in range(3) for cloud in clouds(16, 16, IMAGES, seed)]).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(images).sum(), images)
    lengths = gradient.flatten(1).norm(dim=1)
    assert lengths.max() < 1 + ROUNDING
    assert lengths.mean() > 0.2  # it has learned something
    moves = gradient.detach() / lengths.view(-1, 1, 1, 1)
    for length in (0.1, 10):
        change = critic(images.detach() + length * moves) - critic(images.detach())
        assert (change.abs() <= length * (1 + 1e-4)).all()


CONVOLUTIONS = {
    "3x3": (nn.Conv2d(2, 4, 3, padding=1), (2, 12, 12)),
    "stride 2": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 12, 12)),
    "stride of kernel": (nn.Conv2d(2, 4, 3, stride=3), (2, 12, 12)),
    "stride beyond kernel": (nn.Conv2d(1, 4, 2, stride=3), (1, 11, 11)),
    "dilated": (nn.Conv2d(1, 2, 3, stride=2, dilation=2), (1, 13, 13)),
    "circular": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 8, 8)),
    "groups": (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 8, 8)),
    "oblong": (nn.Conv2d(1, 3, (1, 5), stride=(1, 2)), (1, 6, 13)),
    "1d": (nn.Conv1d(2, 3, 5, stride=2, padding=2), (2, 40)),
    "3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 5, 5, 5)),
}


@pytest.mark.parametrize("alike", [False, True], ids=["random", "all weights alike"])
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_that_overlap(layer, shape, alike):
    """The norm of the whole map; equal weights come close to the bound where patches overlap."""
    layer = copy.deepcopy(layer)
    nn.init.normal_(layer.weight, generator=rng()) if not alike else nn.init.ones_(layer.weight)
    WassersteinCritic(layer, lipschitz="spectral-norm")
    matrix = torch.autograd.functional.jacobian(layer, torch.zeros(1, *shape)).flatten(-len(shape) - 1)
    norm = torch.linalg.matrix_norm(matrix.flatten(0, -2).double(), 2)
    assert (0.6 if alike else 0.2) < norm < 1 + ROUNDING


# Derivatives


@every_way
def test_gradients_are_those_of_finite_differences(way):
    critic = copy.deepcopy(trained(way, (3,))).double()
    x, y = (cloud.double().requires_grad_() for cloud in clouds(5, 4))
    assert torch.autograd.gradcheck(critic.gap, (x, y))
    loss = critic.objective(x, y, generator=rng()).loss
    weights = [each for each in critic.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    moves = [torch.randn(each.shape, generator=rng(), dtype=torch.float64) for each in weights]
    sides = []
    for step in (1e-6, -2e-6):
        for each, move in zip(weights, moves, strict=True):
            each.data.add_(move, alpha=step)
        sides.append(critic.objective(x, y, generator=rng()).loss)
    along = sum((gradient * move).sum() for gradient, move in zip(gradients, moves, strict=True))
    assert ((sides[0] - sides[1]) / 2e-6).item() == pytest.approx(along.item(), rel=1e-4, abs=1e-7)


def test_gradient_norm_is_measured_between_the_clouds():
    class Ramp(nn.Module):
        """Slope 3 between 0 and 1, and 0 elsewhere."""

        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(3.0))

        def forward(self, points):
            return self.slope * points.clamp(0, 1)

    critic = WassersteinCritic(Ramp(), lipschitz="gradient-penalty", penalty=2.0)
    x, y = torch.full((4000, 1), 2.0), torch.zeros(3, 1)
    norm = critic.gradient_norm(x, y)
    assert set(norm.tolist()) == {0.0, 3.0}
    assert norm.shape == (4000,)
    assert norm.mean().item() == pytest.approx(1.5, rel=0.1)
    assert critic.distance(x, y).item() == pytest.approx(2, rel=0.1)
    # (3 - 1)^2 on one half and (0 - 1)^2 on the other, of which the one-sided penalty has only the first.
    assert critic.objective(x, y).penalty.item() == pytest.approx(2 * 2.5, rel=0.1)
    critic.lipschitz = "one-sided-penalty"
    assert critic.objective(x, y).penalty.item() == pytest.approx(2 * 2, rel=0.1)


# Units


@every_way
def test_units_do_not_matter(way):
    """A power of two changes no digit; a shift rounds the points."""
    x, y = (cloud.mul(2**8).round() / 2**8 for cloud in clouds(48, 32, (4,), shift=2.0))

    def distance(scale, shift=0.0):
        critic = WassersteinCritic(4, lipschitz=way)
        return critic_distance(scale * x + shift, scale * y + shift, critic=critic, steps=20).value / scale

    expected = distance(1.0)
    for scale in (2.0**10, 2.0**-10):
        torch.testing.assert_close(distance(scale), expected, rtol=1e-6, atol=0)
    for scale, shift in ((1000.0, 0.0), (1e-3, 0.0), (1.0, 1e3), (1000.0, 1e6)):
        torch.testing.assert_close(distance(scale, shift), expected, rtol=0.03, atol=0)


@every_way
def test_identical_points_have_no_distance(way):
    for point in (torch.zeros(3), torch.full((3,), 1e3)):
        x = point.repeat(8, 1)
        training = CriticTraining(WassersteinCritic(3, lipschitz=way))
        for _ in range(5):
            update = training.update(x, x[:5])
            assert update.gap.abs() <= 1e-5 * point.norm().clamp_min(1e-6)
        assert all(each.isfinite().all() for each in state_of(training))


@every_way
def test_low_precision_and_autocast_change_nothing(way):
    one, other = (copy.deepcopy(trained(way, (3,))) for _ in range(2))
    x, y = (cloud.bfloat16() for cloud in clouds())
    plain = other(x.float()), other.gradient_norm(x.float(), y.float())
    with torch.autocast("cpu", torch.bfloat16):
        scores = one(x)
        assert scores.dtype == torch.float32
        assert equal((scores, one.gradient_norm(x.float(), y.float())), plain)
        first = CriticTraining(one).update(x, y)
    second = CriticTraining(other).update(x.float(), y.float())
    assert torch.equal(first.gap, second.gap)
    assert equal(list(one.state_dict().values()), list(other.state_dict().values()))
    assert one(x.double()).dtype == torch.float32
    assert one.double()(x).dtype == torch.float64


# State


@every_way
def test_random_numbers_modes_and_inputs_are_left_alone(way):
    before = torch.get_rng_state()
    critic = WassersteinCritic(3, lipschitz=way)
    x, y = (cloud.requires_grad_() for cloud in clouds())
    training = CriticTraining(critic)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            critic_distance(x, y, steps=2, critic=WassersteinCritic(3, lipschitz=way))
            update = training.update(x, y)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert not any(torch.as_tensor(each).requires_grad for each in update)
    assert x.grad is None
    assert y.grad is None
    assert all(each.grad is None and each.requires_grad for each in critic.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@every_way
def test_scores_under_inference_mode(way):
    critic = trained(way, (3,))
    x, y = clouds()
    expected = critic(x)
    with torch.inference_mode():
        assert torch.equal(critic(x + 0), expected)
        assert critic.gap(x, y + 0).isfinite()


@every_way
def test_frozen_keeps_the_weights_and_lets_the_points_go(way):
    critic = copy.deepcopy(trained(way, (3,)))
    next(critic.parameters()).requires_grad_(False)
    flags = [each.requires_grad for each in critic.parameters()]
    x, y = clouds()
    points = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(critic.distance(points, y), points)

    def backward():
        with critic.frozen():
            critic.distance(points, y).backward()
            raise KeyError

    with pytest.raises(KeyError):
        backward()
    assert torch.equal(points.grad, expected)
    assert all(each.grad is None for each in critic.parameters())
    assert [each.requires_grad for each in critic.parameters()] == flags


@every_way
def test_stopped_and_resumed_it_continues_exactly(way):
    def advance(training, steps):
        return [training.update(*clouds(seed=step, shift=step / 9)) for step in steps]

    whole = CriticTraining(WassersteinCritic(3, lipschitz=way))
    advance(whole, range(6))
    saved = copy.deepcopy(whole.state_dict())
    rest = advance(whole, range(6, 12))
    resumed = CriticTraining(WassersteinCritic(3, lipschitz=way, seed=5))
    resumed.load_state_dict(saved)
    again = advance(resumed, range(6, 12))
    assert {update.steps for update in rest} != {1}
    for one, other in zip(rest, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert equal(state_of(resumed), state_of(whole))


def test_a_module_of_the_users_is_resumed_too():
    """Where the points lie is not known before it has seen some."""

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), GroupSort(), nn.Linear(8, 1))

    torch.manual_seed(0)
    whole = CriticTraining(WassersteinCritic(network()))
    whole.update(*clouds(shape=(3, 4)))
    resumed = CriticTraining(WassersteinCritic(network()))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for each in (whole, resumed):
        each.update(*clouds(shape=(3, 4), seed=1))
    assert equal(state_of(whole), state_of(resumed))
    with pytest.raises(ValueError, match=r"takes points of shape \(N, 3, 4\), got \(24, 12\)"):
        resumed.update(*clouds(shape=(12,)))


@every_way
def test_a_copy_learns_for_itself(way):
    training = CriticTraining(WassersteinCritic(3, lipschitz=way))
    training.update(*clouds())
    copied, before = copy.deepcopy(training), [each.clone() for each in state_of(training)]
    copied.update(*clouds(seed=1))
    assert equal(state_of(training), before)
    training.update(*clouds(seed=1))
    assert equal(state_of(training), state_of(copied))


# Training


@pytest.mark.parametrize(
    ("way", "lr"),
    [pytest.param(way, lr, marks=[slow] * (lr < 0.1 and way != "orthogonal")) for way in WAYS for lr in (0.016, 0.16)],
)
def test_steps_follow_the_need(way, lr):
    """One where it has converged, more where the clouds have moved; never above the most."""
    draw = rng()
    training = CriticTraining(WassersteinCritic(8, lipschitz=way), lr=lr, max_steps=4)

    def taken(batches, shift):
        found = []
        for _ in range(batches):
            x, y = (torch.randn(64, 8, generator=draw) for _ in range(2))
            found.append(training.update(x + shift, y).steps)
        return found

    fresh, moved = taken(130, 1.0), taken(30, -1.0)
    assert 2 <= max(fresh[:30]) <= 4
    assert sum(fresh[-20:]) <= (45 if lr < 0.1 else 25)  # a slow learner is behind for longer
    assert 2 <= max(moved) <= 4


def test_more_steps_are_taken_on_the_same_batch():
    x, y = clouds(64, 64)
    one, many = (CriticTraining(WassersteinCritic(3), max_steps=most) for most in (1, 5))
    for training in (one, many):
        steps = [training.update(x, y).steps for _ in range(10)]
    assert max(steps) >= 2
    assert many.critic.gap(x, y) > one.critic.gap(x, y)


def in_two_threads(way, batches, average=True):
    """Two ranks: each with a batch of its own, and a mean that waits for the other."""
    barrier, slots, steps = threading.Barrier(2, timeout=60), [None, None], [[], []]
    trainings = [CriticTraining(WassersteinCritic(3, lipschitz=way)) for _ in slots]

    def work(rank):
        def mean(values):
            slots[rank] = values
            barrier.wait()
            result = (slots[0] + slots[1]) / 2
            barrier.wait()
            return result

        for batch in batches:
            half = [cloud[rank::2] for cloud in batch]
            steps[rank].append(trainings[rank].update(*half, average=mean if average else None).steps)

    with one_core_each(2) as pool:
        list(pool.map(work, (0, 1)))
    return trainings, steps


@every_way
def test_two_ranks_are_one(way):
    batches = [clouds(32, 32, (3,), seed, shift=2 - seed / 5) for seed in range(20)]
    (first, second), steps = in_two_threads(way, batches)
    assert len(steps[0]) == 20
    assert steps[0] == steps[1]
    assert set(steps[0]) != {1}
    assert equal(state_of(first), state_of(second))
    alone, _ = in_two_threads(way, batches[:2], average=False)
    assert not equal(state_of(alone[0]), state_of(alone[1]))
    if way in BOUNDED:  # a penalty looks at other places
        whole = CriticTraining(WassersteinCritic(3, lipschitz=way))
        for batch in batches:
            whole.update(*batch)
        torch.testing.assert_close(first.critic(batches[0][0]), whole.critic(batches[0][0]), rtol=0, atol=0.02)


# Errors

X, Y = torch.zeros(4, 3), torch.ones(5, 3)


class Scores(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(3, width)

    def forward(self, points):
        return self.layer(points)


BAD_NETWORKS = {
    "no width": (0, {}, r"at least one value, got shape \(N, 0\)"),
    "odd width": (3, {"width": 7}, r"width must be even and at least 2.*got 7"),
    "depth": (3, {"depth": 0}, r"depth must be at least 1, got 0"),
    "penalty": (3, {"penalty": 0.0}, r"penalty must be positive and finite, got 0.0"),
    "infinite penalty": (3, {"penalty": math.inf}, r"penalty must be positive and finite, got inf"),
    "way": (3, {"lipschitz": "ortogonal"}, r"'ortogonal'.*orthogonal"),
    **{
        f"BatchNorm, {way}": (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            {"lipschitz": way},
            r"BatchNorm1d at '1'.* depends on the other samples",
        )
        for way in WAYS
    },
    "LayerNorm": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1)), {}, r"cannot constrain the LayerNorm at '0'"),
    "transposed": (nn.ConvTranspose2d(1, 1, 3), {"lipschitz": "spectral-norm"}, r"cannot constrain the ConvTranspose2d"),
    "overlap": (nn.Conv2d(1, 1, 3), {}, r"stride equal to kernel size.*has kernel \(3, 3\)"),
    "groups": (nn.Conv2d(2, 2, 2, stride=2, groups=2), {}, r"and 2 groups"),
    "reflections": (
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), {"lipschitz": "spectral-norm"}, r"padding_mode='reflect'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("network", "options", "match"), BAD_NETWORKS.values(), ids=BAD_NETWORKS)
def test_bad_networks(network, options, match):
    with pytest.raises(ValueError, match=match):
        WassersteinCritic(network, **options)


BAD_POINTS = {
    "another width": (3, (X[:, :2], Y[:, :2]), r"points of shape \(N, 3\), got \(4, 2\): create a critic"),
    "one another width": (3, (X, Y[:, :2]), r"points of shape \(N, 3\), got \(5, 2\)"),
    "unlike, in a module of the user's": (Scores(1), (X, Y[:, :2]), r"points of shape \(N, 3\), got \(5, 2\)"),
    "images": (3, (torch.zeros(4, 1, 8, 8), Y), r"points of shape \(N, 3\), got \(4, 1, 8, 8\)"),
    "no dimension": (
        Scores(1),
        (X[:, 0], Y[:, 0]),
        r"points \(N, ...\) of a floating dtype, got torch.float32 of shape \(4,\)",
    ),
    "integers": (3, (X.long(), Y), r"points \(N, ...\) of a floating dtype, got torch.int64"),
    "one": (3, (X[:1], Y), r"two samples or more on each side, got 1"),
    "one of the others": (3, (X, Y[:1]), r"two samples or more on each side, got 1"),
    "none": (3, (X[:0], Y), r"two samples or more on each side, got 0"),
    "NaN": (3, (X / 0, Y), r"NaN or infinite"),
    "infinite": (3, (X, Y / 0), r"NaN or infinite"),
    "coarse weights": (WassersteinCritic(3).bfloat16(), (X, Y), r"weights are torch.bfloat16.*critic.float"),
}


@pytest.mark.parametrize(("network", "points", "match"), BAD_POINTS.values(), ids=BAD_POINTS)
def test_bad_points_are_refused_before_anything_is_learned(network, points, match):
    critic = network if isinstance(network, WassersteinCritic) else WassersteinCritic(copy.deepcopy(network))
    training = CriticTraining(critic)
    before = [each.clone() for each in state_of(training)]
    with pytest.raises(ValueError, match=match):
        training.update(*points)
    with pytest.raises(ValueError, match=match):
        critic_distance(*points, critic=critic)
    assert equal(state_of(training), before)


@pytest.mark.parametrize("way", PENALISED)
def test_a_first_batch_on_which_a_module_of_the_users_fails_leaves_the_critic_as_it_was(way):
    torch.manual_seed(0)
    failed = CriticTraining(WassersteinCritic(Scores(1), lipschitz=way))
    untouched = copy.deepcopy(failed)
    with pytest.raises(ValueError, match=r"network fails on points of shape \(N, 2\)"):
        failed.update(X[:, :2], Y[:, :2])
    assert equal(state_of(failed), state_of(untouched))
    for each in (failed, untouched):
        each.update(*clouds())
    assert equal(state_of(failed), state_of(untouched))


def test_scores_must_be_one_a_point():
    with pytest.raises(ValueError, match=r"score for each of the 9 points, \(9,\) or \(9, 1\), got \(9, 2\)"):
        CriticTraining(WassersteinCritic(Scores(2))).update(X, Y)


BAD_SETTINGS = {
    "max_steps": (lambda: CriticTraining(WassersteinCritic(3), max_steps=0), r"max_steps must be at least 1, got 0"),
    "lr": (lambda: CriticTraining(WassersteinCritic(3), lr=0.0), r"lr must be positive, and at most 1 .* got 0.0"),
    "large lr": (lambda: CriticTraining(WassersteinCritic(3), lr=1.5), r"at most 1 for orthonormal layers, got 1.5"),
    "nothing to train": (lambda: CriticTraining(WassersteinCritic(nn.Flatten())), r"no parameters to train"),
    "steps": (lambda: critic_distance(X, Y, steps=0), r"steps must be at least 1 and .* got 0 and 256"),
    "batch_size": (lambda: critic_distance(X, Y, batch_size=1), r"batch_size at least 2, got 1000 and 1"),
    "one cloud": (lambda: critic_distance(X), r"two tensors x and y, or only x, a function"),
    "a function and a cloud": (
        lambda: critic_distance(lambda: (X, Y), Y),
        r"two tensors x and y, or only x, a function",
    ),
}


@pytest.mark.parametrize(("call", "match"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(call, match):
    with pytest.raises(ValueError, match=match):
        call()

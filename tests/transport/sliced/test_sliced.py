"""The sliced distance against POT, closed forms, finite differences and the invariances of the problem."""

import copy
import math
import pickle

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ot.sliced import max_sliced_wasserstein_distance, sliced_wasserstein_distance

from lightning_wdefense.transport import SlicedWasserstein, sliced_wasserstein
from lightning_wdefense.transport.sliced.directions import orthogonal_directions, random_directions

DOUBLE = {"dtype": torch.float64}
CHOICES = ["orthogonal", "random", "max"]
X, Y = torch.zeros(4, 3), torch.ones(5, 3)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(n=12, m=9, d=3, seed=0, batch=()):
    draw = rng(seed)
    x = torch.randn(*batch, n, d, generator=draw, **DOUBLE)
    y = 0.7 * torch.randn(*batch, m, d, generator=draw, **DOUBLE) + 0.5
    a = torch.rand(*batch, n, generator=draw, **DOUBLE) + 0.05
    b = torch.rand(*batch, m, generator=draw, **DOUBLE) + 0.05
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


# Values


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 9), (12, 8), (1, 5)])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_is_that_of_pot(p, weighted, n, m):
    x, y, a, b = clouds(n, m, 4)
    weights = (a, b) if weighted else (None, None)
    directions = random_directions(7, 4, rng())
    expected = sliced_wasserstein_distance(x, y, *weights, p=p, projections=directions.T)
    torch.testing.assert_close(sliced_wasserstein(x, y, *weights, p=p, directions=directions), expected)
    torch.testing.assert_close(sliced_wasserstein(x, y, *weights, p=p, directions=5 * directions), expected)


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("directions", [*CHOICES, torch.tensor([[-2.0]])], ids=str)
def test_one_dimension_is_exact(directions, p):
    x, y, a, b = clouds(d=1)
    exact = ot.emd2(a.numpy(), b.numpy(), ((x - y.T).abs() ** p).numpy()) ** (1 / p)
    assert sliced_wasserstein(x, y, a, b, p=p, directions=directions).item() == pytest.approx(exact)


def test_uniform_weights_may_be_left_out_or_given_on_one_side():
    x, y, _, _ = clouds(12, 8)
    a, b = torch.full((12,), 1 / 12, **DOUBLE), torch.full((8,), 1 / 8, **DOUBLE)
    for weights in ((a, b), (a, None), (None, b)):
        torch.testing.assert_close(sliced_wasserstein(x, y, *weights), sliced_wasserstein(x, y))


def test_points_of_no_weight_do_not_matter_and_mass_scales_the_power():
    x, y, a, b = clouds()
    more, none = torch.cat([100 + x[:2], x, -100 + x[:2]]), torch.zeros(2, **DOUBLE)
    expected = sliced_wasserstein(x, y, a, b)
    torch.testing.assert_close(sliced_wasserstein(more, y, torch.cat([none, a, none]), b), expected)
    torch.testing.assert_close(sliced_wasserstein(x, y, 5 * a, 5 * b), 5**0.5 * expected)


@pytest.mark.parametrize("p", [1, 2])
def test_translation(p):
    x, _, a, _ = clouds(d=4)
    t = torch.tensor([1.0, -2.0, 0.5, 3.0], **DOUBLE)
    directions = random_directions(9, 4, rng())
    expected = (directions @ t).abs().pow(p).mean() ** (1 / p)
    torch.testing.assert_close(sliced_wasserstein(x, x + t, a, a, p=p, directions=directions), expected)
    torch.testing.assert_close(sliced_wasserstein(x, x + t, a, a, p=p, directions="max"), t.norm())


def test_whole_orthogonal_blocks_are_exact_for_a_translation():
    x, t = clouds(d=5)[0], torch.arange(5, **DOUBLE)
    for n in (5, 10):
        torch.testing.assert_close(sliced_wasserstein(x, x + t, n_projections=n), t.norm() / 5**0.5)
    values = [sliced_wasserstein(x, x + t, n_projections=64, directions="random", seed=seed) for seed in range(50)]
    assert torch.stack(values).square().mean().sqrt().item() == pytest.approx(t.norm().item() / 5**0.5, rel=0.03)


def test_quantiles_of_gaussians():
    levels = (torch.arange(20_000, **DOUBLE) + 0.5) / 20_000
    quantiles = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    distance = sliced_wasserstein((1 + 2 * quantiles)[:, None], (-2 + 0.5 * quantiles[::2])[:, None])
    assert distance.item() == pytest.approx(math.hypot(3, 1.5), rel=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_max_is_above_any_direction_it_started_from_and_below_transport(p):
    for seed in range(4):
        x, y, a, b = clouds(d=6, seed=seed)
        y = y - y.mean(0) + x.mean(0)  # So that the means do not tell where to look.
        value = sliced_wasserstein(x, y, a, b, p=p, directions="max").item()
        start = orthogonal_directions(64, 6, rng())
        assert value > max_sliced_wasserstein_distance(x, y, a, b, p=p, projections=start.T).item()
        assert value <= ot.emd2(a, b, torch.cdist(x, y) ** p).item() ** (1 / p) + 1e-9


def test_max_finds_the_direction_in_which_clouds_differ():
    x = torch.randn(400, 20, generator=rng())
    y = x.clone()
    y[:, 7] *= 3
    expected = sliced_wasserstein(x[:, 7:8], y[:, 7:8])
    assert sliced_wasserstein(x, y, directions="max", n_projections=20).item() >= 0.99 * expected.item()


def test_max_climbs_where_all_directions_are_nearly_as_good():
    """Between the origin and points of a second moment, whose largest eigenvalue is the answer."""
    basis = torch.linalg.qr(torch.randn(30, 30, generator=rng(), **DOUBLE))[0]
    moment = torch.linspace(1, 1.5, 30, **DOUBLE)
    y = (basis * (30 * moment).sqrt()).T
    value = sliced_wasserstein(torch.zeros(1, 30, **DOUBLE), torch.cat([y, -y]), directions="max", n_projections=8)
    assert 0.999 * 1.5**0.5 < value.item() < 1.5**0.5 + 1e-9


# Directions


@pytest.mark.parametrize(("n", "d"), [(3, 5), (5, 5), (12, 5), (4, 1)])
def test_orthogonal_directions(n, d):
    directions = orthogonal_directions(n, d, rng())
    assert directions.shape == (n, d)
    for block in directions.split(d):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), **DOUBLE))


@pytest.mark.parametrize("draw", [orthogonal_directions, random_directions])
def test_directions_are_uniform(draw):
    directions = torch.cat([draw(3, 3, rng(seed)) for seed in range(1500)])
    torch.testing.assert_close(directions.mean(0), torch.zeros(3, **DOUBLE), atol=0.04, rtol=0)
    torch.testing.assert_close(
        directions.T @ directions / len(directions), torch.eye(3, **DOUBLE) / 3, atol=0.03, rtol=0
    )
    # Archimedes: each coordinate is uniform on [-1, 1].
    quantiles = directions.sort(0).values[len(directions) // 4 :: len(directions) // 4][:3]
    torch.testing.assert_close(
        quantiles, torch.tensor([-0.5, 0, 0.5], **DOUBLE)[:, None].expand(3, 3), atol=0.06, rtol=0
    )


def test_orthogonal_directions_vary_less():
    x, y, _, _ = clouds(30, 30, 8)
    spread = {
        choice: torch.stack(
            [sliced_wasserstein(x, y, n_projections=8, directions=choice, seed=seed) for seed in range(60)]
        ).std()
        for choice in ("orthogonal", "random")
    }
    assert spread["orthogonal"] < 0.7 * spread["random"]


def test_seed_and_generator():
    x, y, _, _ = clouds(d=5)
    for directions in ("orthogonal", "random"):
        options = {"directions": directions, "n_projections": 3}
        assert torch.equal(sliced_wasserstein(x, y, **options), sliced_wasserstein(x, y, seed=0, **options))
        assert not torch.equal(sliced_wasserstein(x, y, **options), sliced_wasserstein(x, y, seed=1, **options))
        generator = rng(1)
        first, second = (sliced_wasserstein(x, y, generator=generator, **options) for _ in range(2))
        assert torch.equal(first, sliced_wasserstein(x, y, seed=1, **options))
        assert not torch.equal(first, second)


# Gradients


@pytest.mark.parametrize(
    ("p", "directions", "weighted"),
    [(p, "orthogonal", weighted) for p in (1, 1.5, 2, 3) for weighted in (False, True)] + [(2, "random", True)],
)
def test_gradients(weighted, directions, p):
    inputs = [tensor.requires_grad_() for tensor in clouds(6, 4, batch=(2,))][: 4 if weighted else 2]
    # The check moves one weight at a time; the other mass follows.
    assert torch.autograd.gradcheck(
        lambda *inputs: sliced_wasserstein(*_normalised(*inputs), p=p, directions=directions, n_projections=4), inputs
    )


def _normalised(x, y, *weights):
    return x, y, *(weight / weight.sum(-1, keepdim=True) for weight in weights)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("directions", CHOICES)
def test_the_value_does_not_depend_on_the_mass_of_the_second_weights(directions, p):
    """It is scaled to that of the first, whose own scales the power."""
    x, y, a, b = clouds(8, 6)
    a.requires_grad_()
    b.requires_grad_()
    value = sliced_wasserstein(x, y, a, b, p=p, directions=directions)
    of_a, of_b = torch.autograd.grad(value, (a, b))
    assert abs((of_b * b).sum().item()) < 1e-9 * (of_b.abs() * b).sum().item()
    torch.testing.assert_close((of_a * a).sum(), value / p)


def test_gradients_of_given_directions_and_second_derivatives():
    x, y, a, b = (tensor.requires_grad_() for tensor in clouds(5, 4))
    directions = (3 * random_directions(4, 3, rng())).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda x, y, a, b, directions: sliced_wasserstein(*_normalised(x, y, a, b), directions=directions),
            (x, y, a, b, directions),
        )


def test_envelope_theorem_holds_where_the_ascent_ends():
    x, y, a, b = (tensor.requires_grad_() for tensor in clouds(8, 8))
    value = sliced_wasserstein(x, y, a, b, directions="max")
    gradient = torch.autograd.grad(value, x)[0]
    move = torch.randn(x.shape, generator=rng(), **DOUBLE)
    ahead, behind = (sliced_wasserstein(x + h * move, y, a, b, directions="max") for h in (1e-3, -1e-3))
    assert (gradient * move).sum().item() == pytest.approx((ahead - behind).item() / 2e-3, rel=2e-2)


@pytest.mark.parametrize("p", [1, 1.5, 2, 7])
@pytest.mark.parametrize("directions", CHOICES)
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_equal_clouds(weighted, directions, p):
    x, _, a, _ = (tensor.requires_grad_() for tensor in clouds())
    inputs = (x, a) if weighted else (x,)
    value = sliced_wasserstein(x, x.detach(), *((a, a.detach()) if weighted else ()), p=p, directions=directions)
    assert value == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, inputs))


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e25])
@pytest.mark.parametrize("p", [1, 2, 20])
def test_powers_neither_vanish_nor_overflow(p, scale):
    x, y, _, _ = (tensor.float() for tensor in clouds())
    expected = scale * sliced_wasserstein(x, y, p=p)
    x, y = (scale * x).requires_grad_(), scale * y
    value = sliced_wasserstein(x, y, p=p)
    torch.testing.assert_close(value, expected, atol=0, rtol=1e-4)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_levels_are_not_rounded():
    """Neighbours swap places in the second cloud, so that every other level is the same sum in another order."""
    x, a = torch.arange(3000.0)[:, None], torch.rand(3000, generator=rng()) / 1500
    y = x.reshape(-1, 2).flip(1).reshape(-1, 1)
    b = a.reshape(-1, 2).flip(1).reshape(-1)
    split = torch.cat([a / 2, b / 2])
    assert sliced_wasserstein(x, torch.cat([x, y]), a, split).item() < 1e-4
    assert sliced_wasserstein(x, y, a, b) == 0
    # A level that float32 cannot tell from the one before it.
    far, few = torch.tensor([[0.0], [1e4]]), torch.tensor([1.0, 1e-8])
    assert sliced_wasserstein(far, torch.zeros(2, 1), few, few).item() == pytest.approx(1, rel=1e-5)


def test_ties_and_a_weight_of_zero_have_valid_gradients():
    x = torch.tensor([[0.0], [0.0], [1.0], [2.0]], requires_grad=True)
    y = torch.tensor([[0.0], [3.0], [3.0], [4.0]])
    assert sliced_wasserstein(x, y, p=1).item() == pytest.approx(1.75)
    assert torch.autograd.grad(sliced_wasserstein(x, y, p=1), x)[0].isfinite().all()
    a = torch.tensor([0.5, 0.0, 0.25, 0.25], requires_grad=True)
    b = torch.full((4,), 0.25)
    value = sliced_wasserstein(x.detach(), y, a, b, p=1)
    (gradient,) = torch.autograd.grad(value, a)
    # The value is convex in the weights of one mass: no such move may fall below the tangent.
    for seed in range(20):
        other = torch.rand(4, generator=rng(seed))
        other = other / other.sum()
        bound = value + (gradient * (other - a)).sum()
        assert sliced_wasserstein(x.detach(), y, other, b, p=1) >= bound - 1e-6


# Invariances

cases = st.tuples(
    st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([1, 1.5, 2])
)


@settings(max_examples=25, deadline=None)
@given(case=cases, choice=st.sampled_from(["orthogonal", "random"]))
def test_invariances(case, choice):
    n, m, d, seed, p = case
    x, y, a, b = clouds(n, m, d, seed)
    options = {"p": p, "directions": choice, "n_projections": 5, "seed": seed}
    value = sliced_wasserstein(x, y, a, b, **options)
    order, shift = torch.randperm(n, generator=rng(seed)), torch.randn(d, generator=rng(seed), **DOUBLE)
    torch.testing.assert_close(sliced_wasserstein(x[order], y, a[order], b, **options), value)
    torch.testing.assert_close(sliced_wasserstein(x + 10 * shift, y + 10 * shift, a, b, **options), value)
    torch.testing.assert_close(sliced_wasserstein(-3 * x, -3 * y, a, b, **options), 3 * value)
    torch.testing.assert_close(sliced_wasserstein(y, x, b, a, **options), value)
    assert sliced_wasserstein(x, x, a, a, **options) == 0
    assert sliced_wasserstein(x, x[order], a, a[order], **options) < 1e-6
    z, _, c, _ = clouds(5, 1, d, seed + 1)
    detour = sliced_wasserstein(x, z, a, c, **options) + sliced_wasserstein(z, y, c, b, **options)
    assert value <= detour + 1e-9


@pytest.mark.parametrize("directions", CHOICES)
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_batch_is_a_loop(weighted, directions):
    inputs = clouds(7, 5, batch=(3,))[: 4 if weighted else 2]
    batched = sliced_wasserstein(*inputs, directions=directions)
    single = [sliced_wasserstein(*each, directions=directions) for each in zip(*inputs, strict=True)]
    assert batched.shape == (3,)
    torch.testing.assert_close(batched, torch.stack(single))


def test_distance_from_the_origin_costs_no_precision():
    x, y, _, _ = (tensor.float() for tensor in clouds())
    x, y = x.mul(2**10).round() / 2**10, y.mul(2**10).round() / 2**10
    torch.testing.assert_close(sliced_wasserstein(x + 1024, y + 1024), sliced_wasserstein(x, y), rtol=1e-5, atol=0)


# State


@pytest.mark.parametrize("directions", CHOICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_and_low_precision_change_nothing(dtype, directions):
    x, y, a, b = (tensor.to(dtype).requires_grad_() for tensor in clouds())

    def evaluate(*inputs):
        value = sliced_wasserstein(*inputs, directions=directions)
        return value, *torch.autograd.grad(value, inputs)

    expected = evaluate(x, y, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluate(x, y, a, b)
    assert all(torch.equal(result, each) for result, each in zip(results, expected, strict=True))
    assert [result.dtype for result in results] == [torch.float32, *[dtype] * 4]
    in_float = evaluate(*(tensor.detach().float().requires_grad_() for tensor in (x, y, a, b)))
    torch.testing.assert_close(results[0], in_float[0])


@pytest.mark.parametrize("directions", [*CHOICES, torch.eye(3, **DOUBLE)], ids=[*CHOICES, "given"])
def test_modes_and_rng_are_left_alone(directions):
    x, y, a, b = clouds()
    x.requires_grad_()
    before = torch.get_rng_state()
    expected = sliced_wasserstein(x, y, a, b, directions=directions)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = sliced_wasserstein(x, y + 0, a, b + 0, directions=directions)
            assert not torch.is_grad_enabled()
        assert not value.requires_grad
        assert torch.equal(value, expected)
    with torch.inference_mode():
        y, b, copied = y + 0, b + 0, directions if isinstance(directions, str) else directions + 0
    (gradient,) = torch.autograd.grad(sliced_wasserstein(x, y, a, b, directions=copied), x)
    assert torch.equal(gradient, torch.autograd.grad(expected, x)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_inside_a_compiled_function():
    x, y, _, _ = clouds()
    x.requires_grad_()
    loss = torch.compile(lambda x, y: 2 * sliced_wasserstein(3 * x, y), backend="eager")
    (gradient,) = torch.autograd.grad(loss(x, y), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(2 * sliced_wasserstein(3 * x, y), x)[0])


def test_module_is_the_function():
    x, y, a, b = clouds()
    distance = SlicedWasserstein(p=1, n_projections=5, directions="random", seed=3)
    expected = sliced_wasserstein(x, y, a, b, p=1, n_projections=5, directions="random", seed=3)
    for module in (distance, pickle.loads(pickle.dumps(distance)), copy.deepcopy(distance)):
        assert torch.equal(module(x, y, a, b), expected)
        assert repr(module) == "SlicedWasserstein(p=1, n_projections=5, directions='random', seed=3)"
    generator = rng(3)
    assert torch.equal(distance(x, y, a, b, generator=generator), expected)
    given = SlicedWasserstein(directions=torch.eye(3))
    assert repr(given) == "SlicedWasserstein(p=2, directions=<tensor (3, 3)>)"
    assert torch.equal(given.double()(x, y), sliced_wasserstein(x, y, directions=torch.eye(3, **DOUBLE)))
    assert not list(given.state_dict())
    assert given.to("meta").directions.device.type == "meta"


# Errors

BAD_INPUTS = {
    "not a tensor": (([[0.0]], Y), {}, TypeError, r"x must be a torch.Tensor, got list"),
    "integers": ((X, Y.long()), {}, TypeError, r"y must have a floating dtype"),
    "images": ((X, torch.zeros(5, 3, 8, 8)), {}, ValueError, r"y.flatten\(1\)"),
    "empty": ((X[:0], Y), {}, ValueError, r"x is empty"),
    "NaN": ((X / 0, Y), {}, ValueError, r"x \(4, 3\) holds NaN or infinite"),
    "other D": ((X, Y[:, :2]), {}, ValueError, r"x and y must agree"),
    "negative weights": ((X, Y, None, Y[:, 0] - 2), {}, ValueError, r"b must not be negative"),
    "unequal sums": ((X, Y, None, Y[:, 0]), {}, ValueError, r"equal sums, got 1 and 5 .*: normalise them\.$"),
    "directions' D": ((X, Y), {"directions": torch.eye(2)}, ValueError, r"shape \(K, 3\) .* got \(2, 2\)"),
    "generator": ((X, Y), {"generator": 3}, TypeError, r"generator must be a torch.Generator or None, got int"),
}

BAD_SETTINGS = {
    "p": ({"p": 0.5}, ValueError, r"p must be at least 1 and finite, got 0.5"),
    "infinite p": ({"p": math.inf}, ValueError, r"p must be at least 1"),
    "NaN p": ({"p": math.nan}, ValueError, r"p must be at least 1"),
    "p's type": ({"p": "2"}, TypeError, r"p must be a number, got str"),
    "n_projections": ({"n_projections": 0}, ValueError, r"n_projections must be a positive integer, got 0"),
    "n_projections' type": ({"n_projections": 2.0}, ValueError, r"n_projections must be a positive integer, got 2.0"),
    "directions": ({"directions": "ortogonal"}, ValueError, r"no choice of directions 'ortogonal'. .*'orthogonal'"),
    "directions' type": ({"directions": 64}, TypeError, r"'max' or a tensor \(K, D\), got int"),
    "directions' dtype": ({"directions": torch.eye(3).long()}, TypeError, r"directions must have a floating dtype"),
    "directions' shape": ({"directions": torch.ones(3)}, ValueError, r"directions must have shape \(K, D\)"),
    "no directions": ({"directions": torch.ones(0, 3)}, ValueError, r"directions must have shape \(K, D\)"),
    "zero directions": (
        {"directions": torch.eye(3) * X[0, 0]},
        ValueError,
        r"directions must not be zero, but row 0 is zero",
    ),
    "NaN directions": ({"directions": torch.eye(3) / 0}, ValueError, r"directions \(3, 3\) holds NaN"),
    "seed": ({"seed": -1}, ValueError, r"seed must be at least 0"),
    "seed's type": ({"seed": None}, TypeError, r"seed must be an integer, got NoneType"),
}


@pytest.mark.parametrize(("args", "options", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(args, options, error, match):
    with pytest.raises(error, match=match):
        sliced_wasserstein(*args, **options)


@pytest.mark.parametrize("function", [lambda **bad: sliced_wasserstein(X, Y, **bad), SlicedWasserstein])
@pytest.mark.parametrize(("options", "error", "match"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(function, options, error, match):
    with pytest.raises(error, match=match):
        function(**options)

"""Gradients against finite differences in float64, and what autograd is told and not told."""

import pytest
import torch

from lightning_wdefense.transport import sinkhorn, sinkhorn_divergence

pytestmark = pytest.mark.usefixtures("either_way")

EXACT = {"tol": 1e-10, "max_iter": 20_000}
FUNCTIONS = {"divergence": sinkhorn_divergence, "sinkhorn": lambda *args, **options: sinkhorn(*args, **options).value}


def clouds(n=7, m=5, d=3, batch=()):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, n, d, generator=rng, dtype=torch.float64)
    y = torch.randn(*batch, m, d, generator=rng, dtype=torch.float64) + 0.5
    a = torch.rand(*batch, n, generator=rng, dtype=torch.float64) + 0.1
    b = torch.rand(*batch, m, generator=rng, dtype=torch.float64) + 0.1
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def cosine(x, y):
    return 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT


LABELS = {"label_cost": 0.7, "x_labels": torch.arange(7) % 2, "y_labels": torch.arange(5) % 3}
CASES = {
    "p2": {"blur": 0.5},
    "p1": {"p": 1, "blur": 0.4},
    "small blur": {"blur": 0.2},
    "reach": {"blur": 0.5, "reach": 1.0},
    "reach p1": {"p": 1, "blur": 0.5, "reach": 0.7},
    "labels": {"blur": 0.5, **LABELS},
    "cosine": {"blur": 0.5, "cost": "cosine"},
    "own cost": {"blur": 0.5, "cost": cosine},
    "own cost, reach and labels": {"blur": 0.5, "cost": cosine, "reach": 1.0, **LABELS},
}


def check(function, inputs, step=1e-5):
    """Directional derivatives by central differences, one random direction for each input."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    gradients = torch.autograd.grad(function(*inputs).sum(), inputs)
    rng = torch.Generator().manual_seed(1)
    for i, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=rng, dtype=gradient.dtype)
        if gradient.ndim < inputs[0].ndim:  # Weights: moved in proportion, to stay positive.
            direction = direction * inputs[i].detach()
        with torch.no_grad():
            ahead, behind = (
                function(*(t + sign * step * direction if j == i else t for j, t in enumerate(inputs))).sum()
                for sign in (1, -1)
            )
        expected = (ahead - behind) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_gradients_of_points_and_weights(function, options):
    x, y, a, b = clouds()
    if "reach" in options:
        a, b = 1.5 * a, 0.8 * b
    check(lambda x, y, a, b: function(x, y, a, b, **EXACT, **options), (x, y, a, b))


@pytest.mark.parametrize("options", [CASES["p2"], CASES["p1"], CASES["reach"]], ids=["p2", "p1", "reach"])
def test_gradients_of_batches(options):
    check(lambda *tensors: sinkhorn_divergence(*tensors, **EXACT, **options), clouds(batch=(3,)))


def test_gradient_of_one_cloud_as_both():
    x = clouds()[0]
    check(lambda x: sinkhorn_divergence(x[:4], x[2:], blur=0.5, **EXACT), (x,))


def test_gradients_of_soft_labels_are_none():
    x = clouds()[0]
    labels = torch.rand(7, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    value = sinkhorn_divergence(x.requires_grad_(), x.detach() + 1, label_cost=1.0, x_labels=labels, y_labels=labels)
    assert torch.autograd.grad(value, labels, allow_unused=True) == (None,)


def test_weighted_sum_over_a_batch():
    x, y, _, _ = clouds(batch=(3,))
    x.requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(weights @ sinkhorn_divergence(x, y), x)
    for i in range(3):
        (alone,) = torch.autograd.grad(weights[i] * sinkhorn_divergence(x[i], y[i]), x)
        torch.testing.assert_close(gradient[i], alone[i], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_default_tolerance_holds_float32_to_one_percent(p):
    rng = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(128, 10, generator=rng, dtype=torch.float64), dim=1)
    y = torch.nn.functional.normalize(x + 0.2 * torch.randn(128, 10, generator=rng, dtype=torch.float64), dim=1)

    def evaluate(dtype, **options):
        pair = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        value = sinkhorn_divergence(*pair, p=p, **options)
        return value.detach().double(), torch.cat(torch.autograd.grad(value, pair)).double()

    value, gradient = evaluate(torch.float32)
    exact_value, exact_gradient = evaluate(torch.float64, tol=1e-6)
    torch.testing.assert_close(value, exact_value, rtol=1e-3, atol=0)
    assert (gradient - exact_gradient).norm() < 1e-2 * exact_gradient.norm()


def test_float32_keeps_its_digits_beside_a_far_group():
    """It draws the centre away from the other points, whose squares then are 1e9 times the temperature."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(25, 3, generator=rng), 0.8 * torch.randn(25, 3, generator=rng) + 0.5
    x[20:], y[20:] = 0.3 * x[20:] + 3000, 0.3 * y[20:] + 3000
    gradients = []
    for dtype, tol in ((torch.float32, 5e-4), (torch.float64, 1e-6)):
        cloud = x.to(dtype).requires_grad_()
        value = sinkhorn_divergence(cloud, y.to(dtype), blur=0.1, tol=tol)
        gradients.append(torch.autograd.grad(value, cloud)[0].double())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


@pytest.mark.parametrize("options", [{"blur": 0.5}, {"p": 1, "blur": 0.4}], ids=str)
def test_the_value_does_not_depend_on_the_mass_of_the_second_weights(options):
    """It is scaled to that of the first."""
    x, y, a, b = clouds()
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(x, y, a, b, **EXACT, **options), b)
    assert abs((gradient * b).sum().item()) < 1e-9 * (gradient.abs() * b).sum().item()


def test_no_gradient_pulls_equal_clouds_apart():
    x = clouds(20, d=2)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(x, x.detach().clone(), **EXACT), x)
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("p", [1, 2])
def test_finite_where_points_coincide(p):
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    y = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    sinkhorn_divergence(x, y, p=p).backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


def test_gradient_reaches_the_parameters_of_an_own_cost():
    x, y, a, b = clouds()
    metric = torch.eye(3, dtype=torch.float64)

    def value(metric):
        def cost(u, v):
            return 0.5 * ((u[:, None] - v) @ metric).square().sum(-1)

        return sinkhorn_divergence(x, y, a, b, cost=cost, blur=0.5, **EXACT)

    check(value, (metric,))


def test_blur_is_a_constant_for_the_gradient():
    x, y, _, _ = clouds()
    x.requires_grad_()
    blur = sinkhorn(x, y).blur
    assert not blur.requires_grad
    relative, absolute = (
        torch.autograd.grad(sinkhorn_divergence(x, y, **options), x)[0] for options in ({}, {"blur": blur.item()})
    )
    torch.testing.assert_close(relative, absolute)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_second_derivatives(function, options):
    x, y, a, b = clouds()
    if "reach" in options:
        a, b = 1.5 * a, 0.8 * b
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(tensor.shape, generator=rng, dtype=torch.float64) for tensor in (x, y, a, b)]
    if "reach" not in options:  # Balanced, only the derivatives along weights of sum zero mean anything.
        weights[2:] = [weight - weight.mean() for weight in weights[2:]]

    def slope(*inputs):
        value = function(*(t if t.requires_grad else t.requires_grad_() for t in inputs), **EXACT, **options)
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        return sum((gradient * weight).sum() for gradient, weight in zip(gradients, weights, strict=True))

    inputs = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
    second = torch.autograd.grad(slope(*inputs), inputs)
    for i, gradient in enumerate(second):
        direction = weights[i] * (inputs[i].detach() if i > 1 else 1)
        if i > 1 and "reach" not in options:
            direction = direction - direction.mean()
        ahead, behind = (
            slope(*(t.detach() + sign * 1e-5 * direction if j == i else t.detach() for j, t in enumerate(inputs)))
            for sign in (1, -1)
        )
        torch.testing.assert_close((gradient * direction).sum(), (ahead - behind).detach() / 2e-5, rtol=1e-4, atol=1e-7)


def test_second_derivatives_of_batches_are_those_of_the_problems():
    x, y, _, _ = clouds(batch=(3,))

    def second(x, y):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(sinkhorn_divergence(x, y, blur=0.5, **EXACT).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(x, y), torch.stack([second(x[i], y[i]) for i in range(3)]), rtol=1e-5, atol=1e-8)


def test_gradient_penalty_in_float32():
    x, y, _, _ = clouds()
    results = []
    for dtype in (torch.float32, torch.float64):
        cloud = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(sinkhorn_divergence(cloud, y.to(dtype), tol=1e-5), cloud, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), cloud)[0])
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-2, atol=1e-3 * float(results[1].abs().max()))


def test_second_derivatives_of_geomloss_are_refused():
    x, y, _, _ = clouds()
    x.requires_grad_()
    # The penalty has a path to x of its own, along which a missing second derivative would go unnoticed.
    value = sinkhorn_divergence(x, y, solver="geomloss") + x.square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(value, x, create_graph=True)


def test_only_what_needs_a_gradient_gets_one():
    x, y, a, b = clouds()
    y.requires_grad_()
    b.requires_grad_()
    value = sinkhorn_divergence(x, y, a, b)
    value.backward()
    assert x.grad is None
    assert a.grad is None
    assert y.grad.shape == y.shape
    assert b.grad.shape == b.shape
    result = sinkhorn(x, y, a, b)
    assert [field for field in result._fields if getattr(getattr(result, field), "requires_grad", False)] == ["value"]


def test_gradient_descent_brings_the_clouds_together():
    x, y, _, _ = clouds(20, 20)
    x.requires_grad_()
    optimizer = torch.optim.SGD([x], lr=20 * 0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss = sinkhorn_divergence(x, y, blur=0.3)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


@pytest.mark.parametrize(("cost", "limit"), [(None, 8 * 80 * 5), ("cosine", 8 * 80 * 5), (cosine, 14 * 40 * 40)])
def test_graph_is_small(cost, limit):
    """Nothing of the iterations is kept for the backward pass: the clouds and gradients, and the plans for an own cost."""
    x, y, _, _ = clouds(40, 40, 5)
    x.requires_grad_()
    y.requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sinkhorn_divergence(x, y, cost=cost)
    assert sum(saved) < limit

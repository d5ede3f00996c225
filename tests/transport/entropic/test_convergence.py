"""At default settings every problem converges, to the accuracy that is promised, however it is stored and wherever it starts."""

import warnings

import pytest
import torch

from lightning_wdefense.transport import SinkhornConvergenceWarning, WarmStart, sinkhorn, sinkhorn_divergence
from lightning_wdefense.transport.entropic.newton import method as newton
from lightning_wdefense.transport.entropic.problem import costs
from lightning_wdefense.transport.entropic.solver import arrays
from lightning_wdefense.transport.entropic.solver import potentials as solver

pytestmark = pytest.mark.usefixtures("either_way")

EXACT = {"tol": 1e-6, "max_iter": 5_000}
large = pytest.mark.parametrize("either_way", ["large"], indirect=True)


def paired(n, d, rng):
    """Clean and adversarial features on the sphere: ten classes, some samples pushed into another one."""
    centres = torch.randn(10, d, generator=rng, dtype=torch.float64) / d**0.5
    labels = torch.randint(10, (n,), generator=rng)
    x = centres[labels] + 0.6 * torch.randn(n, d, generator=rng, dtype=torch.float64) / d**0.5
    flipped = (torch.rand(n, 1, generator=rng, dtype=torch.float64) < 0.3) * (
        centres[(labels + 1) % 10] - centres[labels]
    )
    y = x + 0.7 * flipped + 0.3 * torch.randn(n, d, generator=rng, dtype=torch.float64) / d**0.5
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)


def independent(n, d, rng):
    x, y = (torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(2))
    return x, y + 0.5 * (10 / d) ** 0.5


FAMILIES = {
    "paired 64x10": (paired, 64, 10),
    "paired 128x128": (paired, 128, 128),
    "independent 64x2": (independent, 64, 2),
    "independent 96x64": (independent, 96, 64),
}


@pytest.mark.parametrize("relative_blur", [0.5, 0.2, 0.05, 0.02])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_float32_is_right_to_one_percent(family, relative_blur):
    """The whole table, 20 seeds and an independent reference, is ``python -m benchmarks.sinkhorn --robustness``."""
    make, n, d = family
    for seed in range(2):
        clouds = make(n, d, torch.Generator().manual_seed(seed))
        blur = float(sinkhorn(*clouds, relative_blur=relative_blur).blur)

        def evaluate(dtype, clouds=clouds, blur=blur, **options):
            pair = [cloud.to(dtype).requires_grad_() for cloud in clouds]
            value = sinkhorn_divergence(*pair, blur=blur, **options)
            return value.detach().double(), torch.cat(torch.autograd.grad(value, pair)).double()

        with warnings.catch_warnings():
            warnings.simplefilter("error", SinkhornConvergenceWarning)
            value, gradient = evaluate(torch.float32)
        exact_value, exact_gradient = evaluate(torch.float64, **EXACT)
        mean_cost = (blur / relative_blur) ** 2
        torch.testing.assert_close(value, exact_value, rtol=1e-3, atol=1e-6 * mean_cost)
        assert (gradient - exact_gradient).norm() < 1e-2 * exact_gradient.norm()


def test_annealing_saves_iterations(monkeypatch):
    def iterations():
        problems = (independent(64, 3, torch.Generator().manual_seed(seed)) for seed in range(3))
        return sum(sinkhorn(*problem, relative_blur=0.02).n_iter for problem in problems)

    found = iterations()
    monkeypatch.setattr(solver, "levels_above", lambda mean, eps: 0)
    monkeypatch.setattr(newton, "WARMEST", 0)
    assert found < 0.7 * iterations()


def clouds(n=40, m=30, d=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=rng, dtype=dtype)
    return x, 0.8 * torch.randn(m, d, generator=rng, dtype=dtype) + 0.5


def islands():
    """Groups that exchange almost no mass, with different shares of it: the balance between them is hard to find."""
    centres = 10 * torch.arange(4.0).repeat_interleave(10)[:, None]
    x, y = clouds(40, 30, 1)
    return x * 0.1 + centres, y * 0.1 + centres[[0] * 3 + [10] * 12 + [20] * 8 + [30] * 7]


HARD = {
    "two points each": (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.1, 1.0], [0.0, 0.9]])),
    "one point": (torch.zeros(1, 2), clouds(5, 7, 2)[1]),
    "islands": islands(),
    "outlier": (torch.cat([clouds()[0], torch.full((1, 3), 1e3)]), clouds()[1]),
    "duplicates": (clouds()[0].repeat(2, 1), clouds()[0][:20]),
    "tiny": tuple(1e-6 * cloud for cloud in clouds()),
    "huge": tuple(1e6 * cloud for cloud in clouds()),
    "far away": tuple(cloud + 1e6 for cloud in clouds()),
    "far apart": (clouds()[0], clouds()[1] + 100),
}


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"relative_blur": 0.05}], ids=str)
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
def test_hard_problems_converge(hard, options):
    x, y = (cloud.clone().requires_grad_() for cloud in hard)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SinkhornConvergenceWarning)
        value = sinkhorn_divergence(x, y, **options)
    value.backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()
    wide = sinkhorn_divergence(x.detach().double(), y.detach().double(), tol=1e-6, max_iter=10_000, **options)
    scale = float(sinkhorn(x.detach(), y.detach(), relative_blur=1.0, p=options.get("p", 2)).blur) ** options.get(
        "p", 2
    )
    torch.testing.assert_close(value.detach().double(), wide, rtol=2e-3, atol=2e-6 * scale)


@large
@pytest.mark.parametrize("options", [{}, {"reach": 1.0, "blur": 0.5}, {"relative_blur": 0.05}], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("hard", ["two points each", "islands", "outlier", "far apart"])
def test_vectors_of_either_library(monkeypatch, hard, batched, options):
    """Small vectors are NumPy's, large ones and those on a GPU PyTorch's: the steps are the same."""
    x, y = (cloud.double() for cloud in HARD[hard])
    if batched:
        x, y = torch.stack([x, 0.3 * x]), torch.stack([y, 2 * y])
    results = []
    for small in (0, 10**6):
        monkeypatch.setattr(arrays, "SMALL", small)
        results.append(sinkhorn(x, y, tol=1e-6, max_iter=5000, **options))
    assert results[0].converged.all()
    assert results[1].converged.all()
    torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_extrapolation_is_taken_back_where_it_misleads(batched):
    """With the safeguard these take 43 to 84 iterations; without, 90 to 342."""
    problems = []
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        x, y = torch.randn(40, 1, generator=rng), torch.randn(30, 1, generator=rng)
        group = torch.multinomial(torch.rand(4, generator=rng), 30, True, generator=rng)
        problems.append((0.1 * x + 10 * torch.arange(40)[:, None].div(10).floor(), 0.1 * y + 10 * group[:, None]))
    if batched:
        problems = [[torch.stack(each) for each in zip(*problems, strict=True)]]
    for x, y in problems:
        result = sinkhorn(x.double(), y.double(), p=1, relative_blur=0.02, tol=1e-5, max_iter=150)
        assert result.converged.all()


STREAMED = {
    "p2": {},
    "p1": {"p": 1},
    "labels": {"label_cost": 1.0, "x_labels": torch.arange(40) % 3, "y_labels": torch.arange(30) % 3},
    "labels p1": {"p": 1, "label_cost": 1.0, "x_labels": torch.arange(40) % 3, "y_labels": torch.arange(30) % 3},
    "reach": {"reach": 1.0},
    "small blur": {"relative_blur": 0.05},
    "cosine": {"cost": "cosine"},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("options", STREAMED.values(), ids=STREAMED)
def test_large_costs_are_never_stored(monkeypatch, options, weighted):
    x, y = (cloud.double().requires_grad_() for cloud in clouds())
    weights = ()
    if weighted:
        weights = (torch.rand(40, dtype=torch.float64), torch.rand(30, dtype=torch.float64))
        weights[0][3] = weights[1][4] = 0
        weights = tuple((weight / weight.sum()).requires_grad_() for weight in weights)

    def evaluate():
        value = sinkhorn_divergence(x, y, *weights, tol=1e-8, **options)
        return value, *torch.autograd.grad(value, (x, y, *weights))

    stored = evaluate()
    monkeypatch.setitem(costs.STORED, "cpu", 0)
    streamed = evaluate()
    for one, other in zip(stored, streamed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@large
def test_streaming_takes_little_memory(monkeypatch):
    """No tensor as large as the cost is made, in either pass."""
    monkeypatch.setitem(costs.STORED, "cpu", 0)
    monkeypatch.setattr("lightning_wdefense.transport.entropic.solver.kernel.STREAMED", {"cpu": 2**12})
    monkeypatch.setattr("lightning_wdefense.transport.entropic.problem.costs.BLOCK", 2**12)
    x, y = (cloud.requires_grad_() for cloud in clouds(1000, 900, 2))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        sinkhorn_divergence(x, y).backward()
    assert 1000 < largest < 900 * 1000 / 10


def test_warm_start():
    x, y = clouds(dtype=torch.float64)
    handle = WarmStart()
    cold = sinkhorn(x, y, blur=0.1, warm_start=handle)
    assert handle.potential.shape == (1, 30)
    assert "potential of shape (1, 30)" in repr(handle)
    warm = sinkhorn(x + 0.01, y, blur=0.1, warm_start=handle)
    again = sinkhorn(x + 0.01, y, blur=0.1)
    assert warm.n_iter < again.n_iter / 2
    torch.testing.assert_close(warm.value, again.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(cold.value, sinkhorn(x, y, blur=0.1).value)


def one(value):
    return torch.zeros(1, 30).index_fill(1, torch.tensor([3]), value)


USELESS = {
    "large": torch.full((1, 30), 1e9),
    "short": torch.zeros(1, 7),
    "random": torch.randn(1, 30, generator=torch.Generator().manual_seed(0)),
    "NaN": torch.full((1, 30), float("nan")),
    "one NaN": one(float("nan")),
    "one infinite": one(float("inf")),
    "one minus infinite": one(float("-inf")),
}


@pytest.mark.parametrize("options", [{}, {"reach": 1.0}], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("potential", USELESS.values(), ids=USELESS)
def test_a_useless_start_does_no_harm(potential, batched, options):
    x, y = clouds(dtype=torch.float64)
    handle = WarmStart()
    handle.potential = potential.double()
    if batched:
        x, y = x.expand(2, -1, -1), y.expand(2, -1, -1)
        handle.potential = torch.cat([torch.zeros_like(handle.potential), handle.potential])
    result = sinkhorn(x, y, blur=0.1, warm_start=handle, **options)
    assert result.converged.all()
    torch.testing.assert_close(result.value, sinkhorn(x, y, blur=0.1, **options).value, rtol=1e-4, atol=0)


def test_a_call_that_overflows_leaves_a_start_that_does_no_harm():
    x, y = clouds()
    handle = WarmStart()
    with pytest.warns(SinkhornConvergenceWarning):
        assert sinkhorn(1e25 * x, y, warm_start=handle).value.isnan()
    again, cold = sinkhorn(x, y, warm_start=handle), sinkhorn(x, y)
    assert again.n_iter == cold.n_iter
    assert torch.equal(again.value, cold.value)


def test_warm_start_of_a_batch_and_of_the_divergence():
    x, y = (torch.stack([cloud, 2 * cloud]) for cloud in clouds(dtype=torch.float64))
    handle = WarmStart()
    sinkhorn_divergence(x, y, relative_blur=0.1, warm_start=handle)
    warm = sinkhorn(x, y, relative_blur=0.1, warm_start=handle)
    assert warm.n_iter <= 2
    assert handle.potential.shape == (2, 30)


def test_cosine_is_one_minus_the_cosine():
    x, y = clouds(dtype=torch.float64)

    def cosine(u, v):
        return 1 - torch.nn.functional.cosine_similarity(u[:, None], v[None], dim=-1)

    for function in (sinkhorn_divergence, lambda *args, **options: sinkhorn(*args, **options).value):
        expected = function(x, y, cost=cosine, tol=1e-8)
        torch.testing.assert_close(function(x, y, cost="cosine", tol=1e-8), expected, rtol=1e-6, atol=1e-9)

"""Small problems on a CPU go by Newton's method: where it ends, what it leaves to the iteration, and what it costs nobody to know."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lapack

from lightning_wdefense.transport import SinkhornConvergenceWarning, WarmStart, sinkhorn, sinkhorn_divergence
from lightning_wdefense.transport.entropic.newton import method as newton
from lightning_wdefense.transport.entropic.newton import problem as small

EXACT = {"tol": 1e-7, "max_iter": 20_000}


def clouds(n=40, m=30, d=3, seed=0, dtype=torch.float64, batch=()):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=rng, dtype=torch.float64)
    return x.to(dtype), (0.8 * torch.randn(*batch, m, d, generator=rng, dtype=torch.float64) + 0.5).to(dtype)


def weights(n, seed, zeros=0):
    a = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a[:zeros] = 0
    return a / a.sum()


def refuse(*_, **__):
    raise AssertionError("Newton's method was asked")


def large(monkeypatch):
    monkeypatch.setattr(small, "SMALL", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m"), [(small.SMALL, small.SMALL), (small.SMALL + 1, 5), (5, small.SMALL + 1)])
def test_both_sides_of_the_limit(monkeypatch, n, m, dtype):
    x, y = (cloud.requires_grad_() for cloud in clouds(n, m, 4, dtype=dtype))
    value = sinkhorn_divergence(x, y, relative_blur=0.1)
    gradients = torch.autograd.grad(value, (x, y))
    wide = [cloud.detach().double().requires_grad_() for cloud in (x, y)]
    large(monkeypatch)
    exact = sinkhorn_divergence(*wide, relative_blur=0.1, **EXACT)
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - expected).norm() < 1e-2 * expected.norm()


def test_only_small_problems_are_asked(monkeypatch):
    monkeypatch.setattr(small, "newton", refuse)
    sinkhorn(*clouds(small.SMALL + 1, 5))
    sinkhorn(*clouds(5, small.SMALL + 1))
    with pytest.raises(AssertionError, match="was asked"):
        sinkhorn(*clouds(5, small.SMALL))
    sinkhorn(*clouds(batch=(small.FEW + 1,)))
    with pytest.raises(AssertionError, match="was asked"):
        sinkhorn(*clouds(batch=(small.FEW,)))


OPTIONS = {
    "default": {},
    "small blur": {"relative_blur": 0.02},
    "p=1": {"p": 1},
    "reach": {"reach": 0.7},
    "near reach": {"reach": 0.05, "blur": 0.3},
    "labels": {"label_cost": 1.0, "x_labels": torch.arange(40) % 3, "y_labels": torch.arange(30) % 3},
    "own cost": {"cost": lambda x, y: torch.cdist(x, y).sqrt() - 1, "blur": 0.4},
    "cosine": {"cost": "cosine"},
}
WEIGHTS = {"uniform": None, "weighted": 0, "padded": 7}
"""Of each kind the number of zeros, if there are weights."""


@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        # The iteration takes very long for this one pair.
        pytest.param(
            options, zeros, id=f"{name}-{kind}", marks=[pytest.mark.slow] * (kind + name == "paddedsmall blur")
        )
        for name, options in OPTIONS.items()
        for kind, zeros in WEIGHTS.items()
    ],
)
def test_is_what_the_iteration_finds(monkeypatch, options, zeros):
    x, y = clouds()
    inputs = [x, y] if zeros is None else [x, y, weights(40, 1, zeros), weights(30, 2, zeros)]
    results = []
    for asked in (True, False):
        if not asked:
            large(monkeypatch)
        inputs = [each.detach().clone().requires_grad_() for each in inputs]
        value = sinkhorn_divergence(*inputs, **EXACT, **options)
        result = sinkhorn(*inputs, **EXACT, **options)
        assert result.converged
        assert result.n_iter > 1
        gradients = torch.autograd.grad(value, inputs) + torch.autograd.grad(result.value, inputs)
        potentials = (result.f + result.g.mean(), result.g - result.g.mean()) if "reach" not in options else result[1:3]
        if options.get("relative_blur") == 0.02:  # Almost nothing is exchanged between groups of points.
            potentials = ()
        results.append((value, result.value, result.blur, *potentials, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_newton_cannot_finish_ends_as_without_it(monkeypatch, batch, dtype):
    x, y = clouds(dtype=dtype, batch=batch)
    found = {}
    for way in ("given up", "not finite", "never asked"):
        with monkeypatch.context() as patch:
            if way == "given up":
                patch.setattr(newton, "STEPS", -1)
                patch.setattr(small, "averaged", lambda *_, **__: None)
            elif way == "not finite":
                patch.setattr(small, "_optimum", lambda *_: None)
            else:
                large(patch)
            cloud = x.clone().requires_grad_()
            value = sinkhorn_divergence(cloud, y, relative_blur=0.05)
            result = sinkhorn(x, y, relative_blur=0.05)
            found[way] = result, value, *torch.autograd.grad(value.sum(), cloud)
    for way in ("given up", "not finite"):
        assert batch or abs(found[way][0].n_iter - found["never asked"][0].n_iter) <= 1
        assert found[way][0].g.shape == (*batch, 30)
        for one, other in zip(found[way][1:], found["never asked"][1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("options", [{}, {"reach": 1.0}], ids=str)
def test_steps_that_lead_down_are_taken_back(monkeypatch, options):
    """A first step that goes far too far costs one step, and not the way back."""
    x, y = clouds()
    expected = sinkhorn(x, y, relative_blur=0.05, **EXACT, **options)
    monkeypatch.setattr(small, "optimum", refuse)
    monkeypatch.setattr(newton, "LONGEST", 1e3)
    steps = []

    def dposv(*args, _solve=lapack.dposv, **kwargs):
        factor, step, failed = _solve(*args, **kwargs)
        steps.append(step)
        return factor, 100 / abs(step).max() * step if len(steps) == 1 else step, failed

    monkeypatch.setattr(lapack, "dposv", dposv)
    result = sinkhorn(x, y, relative_blur=0.05, **EXACT, **options)
    assert 2 < len(steps) < 18
    torch.testing.assert_close(result.value, expected.value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_iter", [1, 2, 7, 23, 41])
@pytest.mark.parametrize("options", [{}, {"reach": 1.0}], ids=str)
def test_iterations_are_limited(monkeypatch, max_iter, options):
    """Too few for Newton's method, and the iteration does with them what it can."""
    x, y = clouds()
    results = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinkhornConvergenceWarning)
            results.append(sinkhorn(x, y, relative_blur=0.03, tol=1e-9, max_iter=max_iter, **options))
        large(monkeypatch)
    asked, never_asked = results
    assert asked.converged == (asked.marginal_error <= 1e-9)
    assert asked.n_iter == never_asked.n_iter
    torch.testing.assert_close(asked.value, never_asked.value)


@pytest.mark.parametrize("options", [{}, {"reach": 1.0}, {"reach": 0.3, "blur": 0.1}], ids=str)
def test_few_steps_are_enough(monkeypatch, options):
    """From where the error is a few percent the steps converge quadratically, with hardly a sweep between them."""
    monkeypatch.setattr(small, "optimum", refuse)
    monkeypatch.setattr(newton, "STEPS", 7)
    monkeypatch.setattr(newton, "SWEEPS", 1)
    assert sinkhorn(*clouds(), **{"blur": 0.3, "tol": 1e-12, **options}).converged


def test_iterations_are_counted():
    x, y = clouds()
    needed = sinkhorn(x, y, relative_blur=0.03, max_iter=1000).n_iter
    assert sinkhorn(x, y, relative_blur=0.03, max_iter=needed).n_iter == needed
    assert newton.FIRST_SWEEPS < needed < 200


def test_problems_of_a_batch_end_as_they_would_alone():
    x, y = clouds(batch=(4,))
    x, y = (cloud * torch.tensor([1.0, 1e-3, 30.0, 1.0]).double()[:, None, None] for cloud in (x, y))
    batch = sinkhorn(x, y, relative_blur=0.05)
    for i in range(4):
        alone = sinkhorn(x[i], y[i], relative_blur=0.05)
        for one, other in zip((alone.value, alone.f, alone.g), (batch.value, batch.f, batch.g), strict=True):
            assert torch.equal(one, other[i])


def test_a_start_is_judged_and_used():
    x, y = clouds()
    handle = WarmStart()
    cold = sinkhorn(x, y, relative_blur=0.05, warm_start=handle)
    assert sinkhorn(x, y, relative_blur=0.05, warm_start=handle).n_iter == 1
    near = sinkhorn(x + 0.01, y, relative_blur=0.05, warm_start=handle)
    assert near.n_iter < cold.n_iter / 2
    handle.potential = 1e3 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).double()
    assert sinkhorn(x, y, relative_blur=0.05, warm_start=handle).n_iter == cold.n_iter


@st.composite
def problems(draw):
    n, m, d = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    x, y = clouds(n, m, d, seed=draw(st.integers(0, 1000)))
    scale, apart = 10.0 ** draw(st.integers(-4, 4)), draw(st.sampled_from([0.0, 0.0, 30.0]))
    if draw(st.booleans()):  # clusters far apart, with different shares of the mass
        x, y = (0.05 * cloud + 10 * (torch.arange(len(cloud)) % 3)[:, None] for cloud in (x, y))
    a, b = (weights(k, seed, draw(st.integers(0, k - 1))) for k, seed in ((n, 1), (m, 2)))
    options = {
        "p": draw(st.sampled_from([1, 2])),
        "relative_blur": draw(st.sampled_from([0.03, 0.2, 3.0, 1e3])),
        "reach": draw(st.sampled_from([None, None, scale, 0.1 * scale])),
    }
    return scale * x, scale * (y + apart), a, b, options


@settings(max_examples=60, deadline=None)
@given(problems())
def test_any_small_problem_is_solved_as_by_the_iteration(problem):
    x, y, a, b, options = problem
    results = []
    for limit in (small.SMALL, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(small, "SMALL", limit)
            cloud = x.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SinkhornConvergenceWarning)
                result = sinkhorn(cloud, y, a, b, tol=1e-6, max_iter=3000, **options)
            assert result.f.isfinite().all()
            assert result.g.isfinite().all()
            results.append((result.converged, result.value, *torch.autograd.grad(result.value, cloud)))
    assert results[0][0] >= results[1][0]
    if results[1][0]:
        size = float(results[1][2].abs().max()) + 1e-9
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-4 * size)

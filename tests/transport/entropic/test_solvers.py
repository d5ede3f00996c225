"""What a result says about the iterations, and the second opinion by geomloss."""

import pickle
import warnings

import pytest
import torch

from lightning_wdefense.transport import (
    SinkhornConvergenceWarning,
    SinkhornDivergence,
    SinkhornResult,
    sinkhorn,
    sinkhorn_divergence,
)

pytestmark = pytest.mark.usefixtures("either_way")


def clouds(n=20, m=15, d=3, batch=(), dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, n, d, generator=rng, dtype=dtype)
    return x, 0.8 * torch.randn(*batch, m, d, generator=rng, dtype=dtype) + 0.5


@pytest.mark.parametrize("solver", ["native", "geomloss"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
def test_result(batch, solver):
    x, y = clouds(batch=batch)
    result = sinkhorn(x, y, solver=solver)
    assert isinstance(result, SinkhornResult)
    assert result.value.shape == result.marginal_error.shape == result.converged.shape == result.blur.shape == batch
    assert result.f.shape == (*batch, 20)
    assert result.g.shape == (*batch, 15)
    assert result.n_iter > 1
    assert torch.equal(result.converged, result.marginal_error <= 5e-4)
    assert torch.equal(pickle.loads(pickle.dumps(result)).value, result.value)


@pytest.mark.parametrize("options", [{}, {"reach": 1.5}], ids=str)
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_marginal_error_is_below_the_tolerance(tol, options):
    x, y = clouds()
    result = sinkhorn(x, y, blur=0.4, tol=tol, **options)
    cost = 0.5 * (x[:, None] - y).square().sum(-1)
    plan = ((result.f[:, None] + result.g - cost) / 0.4**2).exp() / (20 * 15)
    rows, columns = torch.ones(20).double() / 20, torch.ones(15).double() / 15
    if options:
        rows, columns = rows * (-result.f / 1.5**2).exp(), columns * (-result.g / 1.5**2).exp()
    torch.testing.assert_close(plan.sum(1), rows)
    error = ((plan.sum(0) - columns).square() / columns).sum().div(columns.sum()).sqrt()
    torch.testing.assert_close(result.marginal_error, error, rtol=1e-3, atol=1e-12)
    assert result.converged
    assert (plan.sum(0) - columns).abs().sum() / columns.sum() <= error <= tol


@pytest.mark.parametrize("call", [sinkhorn, sinkhorn_divergence, SinkhornDivergence(blur=0.05, max_iter=2)])
def test_warns_once_if_it_does_not_converge(call):
    x, y = clouds()
    options = {} if isinstance(call, SinkhornDivergence) else {"blur": 0.05, "max_iter": 2}
    with pytest.warns(
        SinkhornConvergenceWarning, match=r"max_iter=2 iterations .* above tol=0.0005.* larger blur"
    ) as caught:
        result = call(x, y, **options)
    assert len(caught) == 1
    if call is sinkhorn:
        assert not result.converged
        assert result.marginal_error > 5e-4


def test_does_not_warn_when_it_converges():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn_divergence(*clouds(dtype=torch.float32))
        sinkhorn_divergence(*clouds(batch=(2,), dtype=torch.float32), reach=1.0, p=1)


def test_hard_problems_converge():
    """Small blurs and clouds of different scales in one batch, in float32 too."""
    x, y = clouds(30, 30, 2, batch=(3,), dtype=torch.float32)
    x = x * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    result = sinkhorn(x, y, relative_blur=0.03)
    assert result.converged.all()
    assert result.n_iter < 1000


LABELS = {"label_cost": 1.0, "x_labels": torch.arange(20) % 3, "y_labels": torch.arange(15) % 3}
AGREEMENT = {
    "p2": {"blur": 0.5},
    "p1": {"p": 1},
    "relative": {},
    "reach": {"blur": 0.5, "reach": 1.2},
    "labels": {"blur": 0.5, **LABELS},
    "labels, p1": {"p": 1, **LABELS},
    "own cost": {"blur": 0.5, "cost": lambda x, y: (x[:, None] - y).abs().sum(-1)},
    "own cost and labels": {"blur": 0.5, "cost": lambda x, y: (x[:, None] - y).abs().sum(-1), **LABELS},
}


@pytest.mark.parametrize("options", AGREEMENT.values(), ids=AGREEMENT)
def test_geomloss_agrees(options):
    x, y = clouds()
    a, b = (torch.arange(1, n + 1, dtype=torch.float64) for n in (20, 15))
    a, b = a / a.sum(), b / b.sum()
    if "reach" in options:
        a, b = 1.4 * a, 0.9 * b
    x.requires_grad_()
    native, other = (sinkhorn_divergence(x, y, a, b, **options, solver=solver) for solver in ("native", "geomloss"))
    torch.testing.assert_close(other, native, rtol=1e-2, atol=0)
    if "reach" not in options:  # geomloss's unbalanced gradients are known to be off.
        ours, theirs = (torch.autograd.grad(value, x)[0] for value in (native, other))
        assert (ours - theirs).norm() < 0.05 * ours.norm()
    native, other = (sinkhorn(x, y, a, b, **options, solver=solver) for solver in ("native", "geomloss"))
    torch.testing.assert_close(other.value, native.value, rtol=1e-2, atol=0)
    torch.testing.assert_close(other.f - other.f[0], native.f - native.f[0], rtol=0.05, atol=0.05)
    assert other.marginal_error < 0.05


def test_geomloss_batch_has_one_blur_for_each_problem():
    x, y = clouds(batch=(2,))
    x = x * torch.tensor([1.0, 5.0]).double()[:, None, None]
    batch = sinkhorn_divergence(x, y, solver="geomloss")
    torch.testing.assert_close(
        batch, torch.stack([sinkhorn_divergence(*pair, solver="geomloss") for pair in zip(x, y, strict=True)])
    )
    torch.testing.assert_close(batch, sinkhorn_divergence(x, y), rtol=1e-2, atol=0)


def test_a_problem_does_not_depend_on_its_batch():
    """Neither on problems that take more temperatures, nor on those that take more iterations."""
    x, y = clouds(batch=(4,))
    x = x * torch.tensor([1.0, 30.0, 0.1, 0.0]).double()[:, None, None]
    batch = sinkhorn(x, y, blur=0.3)
    for i in range(4):
        alone = sinkhorn(x[i], y[i], blur=0.3)
        torch.testing.assert_close(batch.f[i], alone.f, rtol=1e-9, atol=1e-9)


def test_own_cost_may_be_negative():
    x, y = clouds()
    value, shifted = (
        sinkhorn(x, y, cost=lambda x, y, c=c: c - x @ y.T, blur=0.5, tol=1e-6).value for c in (0.0, -100.0)
    )
    torch.testing.assert_close(value - 100, shifted)

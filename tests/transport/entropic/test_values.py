"""Values against exact solvers, closed forms and the invariances of the problem."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_wdefense.transport import sinkhorn, sinkhorn_divergence

pytestmark = pytest.mark.usefixtures("either_way")

EXACT = {"tol": 1e-9, "max_iter": 20_000}


def clouds(n=12, m=9, d=3, seed=0, weighted=False):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    y = 0.7 * torch.randn(m, d, generator=rng, dtype=torch.float64) + 0.5
    a = torch.rand(n, generator=rng, dtype=torch.float64) if weighted else torch.ones(n, dtype=torch.float64)
    b = torch.rand(m, generator=rng, dtype=torch.float64) if weighted else torch.ones(m, dtype=torch.float64)
    return x, y, a / a.sum(), b / b.sum()


def cost_matrix(x, y, p):
    return (x[:, None] - y[None]).norm(dim=-1) ** p / p


def kl(plan, reference):
    return float(torch.xlogy(plan, plan / reference).sum() - plan.sum() + reference.sum())


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("p", [1, 2])
def test_small_blur_is_exact_transport(p, weighted):
    x, y, a, b = clouds(weighted=weighted)
    exact = ot.emd2(a.numpy(), b.numpy(), cost_matrix(x, y, p).numpy())
    blur = 0.002 if p == 1 else 0.03
    assert sinkhorn(x, y, a, b, p=p, blur=blur).value.item() == pytest.approx(exact, rel=1e-2)
    assert sinkhorn_divergence(x, y, a, b, p=p, blur=blur).item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("p", [1, 2])
def test_value_and_potentials_are_those_of_pot(p):
    x, y, a, b = clouds(weighted=True)
    cost, eps = cost_matrix(x, y, p), 0.3**p
    plan = torch.from_numpy(ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), eps, method="sinkhorn_log", stopThr=1e-13))
    result = sinkhorn(x, y, a, b, p=p, blur=0.3, **EXACT)
    reference = torch.outer(a, b)
    assert result.value.item() == pytest.approx(float((plan * cost).sum()) + eps * kl(plan, reference), rel=1e-7)
    torch.testing.assert_close(reference * ((result.f[:, None] + result.g - cost) / eps).exp(), plan)


def test_unbalanced_value_is_that_of_pot():
    x, y, a, b = clouds(weighted=True)
    a, b = 1.7 * a, 0.6 * b
    cost, eps, rho = cost_matrix(x, y, 2), 0.5**2, 1.3**2
    plan = torch.from_numpy(
        ot.unbalanced.sinkhorn_unbalanced(
            a.numpy(), b.numpy(), cost.numpy(), eps, rho, reg_type="kl", stopThr=1e-13, numItermax=20_000
        )
    )
    primal = (
        float((plan * cost).sum()) + eps * kl(plan, torch.outer(a, b)) + rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
    )
    assert sinkhorn(x, y, a, b, blur=0.5, reach=1.3, **EXACT).value.item() == pytest.approx(primal, rel=1e-7)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_unbalanced_converges_to_the_accuracy_of_float64(batch, p):
    """One constant in float32 would leave an error of 2e-8, whatever the tolerance."""
    x, y, a, b = (each[None].expand(2, *each.shape) if batch else each for each in clouds(weighted=True))
    result = sinkhorn(x, y, 1.5 * a, 0.8 * b, p=p, blur=0.5, reach=0.7, tol=1e-12, max_iter=100)
    assert result.converged.all()


@pytest.mark.parametrize("p", [1, 2])
def test_unbalanced_divergence_is_that_of_its_definition(p):
    """With half of eps times the square of what one mass has more than the other (Séjourné et al., 2019)."""
    x, y, a, b = clouds(weighted=True)
    a, b = 1.7 * a, 0.6 * b

    def cost(*measures):
        return sinkhorn(*measures, p=p, blur=0.5, reach=1.3, **EXACT).value.item()

    expected = cost(x, y, a, b) - 0.5 * cost(x, x, a, a) - 0.5 * cost(y, y, b, b) + 0.5 * 0.5**p * (1.7 - 0.6) ** 2
    value = sinkhorn_divergence(x, y, a, b, p=p, blur=0.5, reach=1.3, **EXACT)
    assert value.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("options", [{}, {"blur": 0.05}, {"blur": 10.0}], ids=["relative", "small", "large"])
def test_diracs(p, options):
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert sinkhorn_divergence(x, y, p=p, **options).item() == pytest.approx(5.0**p / p)
    assert sinkhorn(x, y, p=p, **options).value.item() == pytest.approx(5.0**p / p)


@pytest.mark.parametrize("relative_blur", [0.1, 0.2, 1.0])
def test_translation_costs_half_its_square(relative_blur):
    x, _, a, _ = clouds(40, d=5, weighted=True)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    value = sinkhorn_divergence(x, x + shift, a, a, relative_blur=relative_blur)
    assert value.item() == pytest.approx(0.5 * float(shift.square().sum()), rel=1e-3)


def gaussian(n, mean, std, rng):
    """A sample whose mean and covariance are exactly ``mean`` and ``diag(std^2)``."""
    sample = torch.randn(n, len(mean), generator=rng, dtype=torch.float64)
    sample = sample - sample.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(sample.T @ sample / n)).T
    return sample @ whitening * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def gaussian_divergence(mean_x, std_x, mean_y, std_y, eps):
    """Janati, Muzellec, Peyré, Cuturi (2020), with cost |x - y|^2 / 2 and axis-aligned covariances."""

    def entropic(s, t):
        d = np.sqrt(4 * s**2 * t**2 + eps**2)
        return 0.5 * np.sum(s**2 + t**2 - d + eps * np.log(d + eps))

    s, t = np.array(std_x), np.array(std_y)
    shift = 0.5 * np.sum((np.array(mean_x) - np.array(mean_y)) ** 2)
    return shift + entropic(s, t) - 0.5 * entropic(s, s) - 0.5 * entropic(t, t)


@pytest.mark.parametrize("blur", [0.5, 1.5])
def test_gaussians(blur):
    rng = torch.Generator().manual_seed(0)
    first, second = ((0.0, 0.0), (1.0, 0.5)), ((1.0, -0.5), (0.4, 2.0))
    x, y = gaussian(700, *first, rng), gaussian(600, *second, rng)
    assert sinkhorn_divergence(x, y, blur=blur).item() == pytest.approx(
        gaussian_divergence(*first, *second, blur**2), rel=0.02
    )


def test_large_blur_is_half_the_squared_distance_of_means():
    x, y, a, b = clouds(weighted=True)
    expected = 0.5 * float((a @ x - b @ y).square().sum())
    assert sinkhorn_divergence(x, y, a, b, blur=1e3).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"reach": 1.0}, {"relative_blur": 0.05}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_between_equal_clouds(options, dtype):
    x = clouds(30, d=4)[0].to(dtype)
    scale = sinkhorn_divergence(x, 2 * x + 1, **options).item()
    assert abs(sinkhorn_divergence(x, x.clone(), **options).item()) < 1e-4 * scale
    assert abs(sinkhorn_divergence(x, x.flip(0), **options).item()) < 1e-4 * scale


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("point", [torch.zeros(3), torch.full((3,), 1e3)], ids=["origin", "far"])
def test_identical_points_stay_finite(p, point):
    x = point.expand(5, 3).clone().requires_grad_()
    y = point.expand(4, 3).clone()
    value = sinkhorn_divergence(x, y, p=p)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert x.grad.abs().max() < 1e-3


def test_weights_count_copies():
    x, y, _, _ = clouds(6, 5)
    copies = torch.tensor([1, 3, 2, 1, 1, 2])
    weighted = sinkhorn_divergence(x, y, copies / copies.sum(), **EXACT)
    torch.testing.assert_close(weighted, sinkhorn_divergence(x.repeat_interleave(copies, 0), y, **EXACT))


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"reach": 0.8}], ids=str)
def test_zero_weights_equal_removal(options):
    x, y, a, b = clouds(weighted=True)
    a, b = torch.cat([a, torch.zeros(2)]), torch.cat([b, torch.zeros(1)])
    far_x, far_y = torch.cat([x, 50 + x[:2]]).requires_grad_(), torch.cat([y, y[:1] - 50])
    value = sinkhorn_divergence(far_x, far_y, a, b, **options)
    torch.testing.assert_close(value, sinkhorn_divergence(x, y, a[:-2], b[:-1], **options), rtol=1e-6, atol=0)
    value.backward()
    assert far_x.grad.isfinite().all()
    assert (far_x.grad[-2:] == 0).all()


@pytest.mark.parametrize("reach", [None, 1.3])
def test_points_of_no_weight_know_their_potential(reach):
    """It answers that of the others, as every potential does, and is what a bit of weight there would cost (among the others: padding)."""
    x, y, a, b = clouds(weighted=True)
    b[:2], y[:2] = 0, (x[:2] + x[2:4]) / 2
    b /= b.sum()
    result = sinkhorn(x, y, a, b, blur=0.5, reach=reach, **EXACT)
    eps, share = 0.5**2, 1.0 if reach is None else reach**2 / (reach**2 + 0.5**2)
    answer = -share * eps * (a.log()[:, None] + (result.f[:, None] - cost_matrix(x, y, 2)) / eps).logsumexp(0)
    torch.testing.assert_close(result.g, answer, rtol=0, atol=1e-7)


def test_labels_in_the_cost():
    x, y, a, b = clouds()
    x_labels, y_labels = torch.arange(12) % 3, torch.arange(9) % 3
    labelled = {"x_labels": x_labels, "y_labels": y_labels}
    cost = cost_matrix(x, y, 2) + 2.0 * (x_labels[:, None] != y_labels)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    assert sinkhorn(x, y, blur=0.03, label_cost=2.0, **labelled).value.item() == pytest.approx(exact, rel=1e-2)
    assert torch.equal(sinkhorn(x, y, blur=0.03, **labelled).value, sinkhorn(x, y, blur=0.03).value)
    assert sinkhorn(x, y, label_cost=2.0, **labelled).blur == sinkhorn(x, y).blur
    one_hot = {key: torch.nn.functional.one_hot(value, 3).double() for key, value in labelled.items()}
    hard, soft = (sinkhorn_divergence(x, y, label_cost=2.0, **labels) for labels in (labelled, one_hot))
    torch.testing.assert_close(hard, soft)
    # Also within a cloud: equal clouds with equal labels are at distance zero, with swapped labels they are not.
    same = {"label_cost": 2.0, "x_labels": x_labels}
    assert sinkhorn_divergence(x, x, **same, y_labels=x_labels).item() == pytest.approx(0, abs=1e-4)
    assert sinkhorn_divergence(x, x, **same, y_labels=(x_labels + 1) % 3).item() > 0.1


def test_soft_labels_cost_their_total_variation():
    x, y = torch.zeros(1, 2), torch.zeros(1, 2)
    labels = {"x_labels": torch.tensor([[0.7, 0.2, 0.1]]), "y_labels": torch.tensor([[0.1, 0.2, 0.7]])}
    assert sinkhorn_divergence(x, y, blur=0.1, label_cost=5.0, **labels).item() == pytest.approx(5 * 0.6)


@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
def test_own_cost(batched):
    x, y, _, _ = clouds()
    if batched:
        x, y = torch.stack([x, 2 * x]), torch.stack([y, y + 1])

    def half_square(u, v):
        assert u.ndim == v.ndim == x.ndim
        return 0.5 * (u[..., :, None, :] - v[..., None, :, :]).square().sum(-1)

    torch.testing.assert_close(sinkhorn_divergence(x, y, cost=half_square), sinkhorn_divergence(x, y))


@pytest.mark.parametrize("options", [{}, {"p": 1, "blur": 0.4}, {"reach": 2.0}, {"label_cost": 1.0}], ids=str)
def test_batch_equals_loop(options):
    pairs = [clouds(seed=seed, weighted=True) for seed in range(4)]
    pairs[1] = (10 * pairs[1][0], *pairs[1][1:])
    x, y, a, b = (torch.stack(each) for each in zip(*pairs, strict=True))
    labels = {"x_labels": torch.arange(48).view(4, 12) % 3, "y_labels": torch.arange(36).view(4, 9) % 2}
    batch = sinkhorn_divergence(x, y, a, b, **labels, **options)
    loop = [
        sinkhorn_divergence(*pair, **{key: value[i] for key, value in labels.items()}, **options)
        for i, pair in enumerate(pairs)
    ]
    torch.testing.assert_close(batch, torch.stack(loop), rtol=1e-6, atol=0)


def test_a_batch_of_large_problems_is_solved_one_by_one(monkeypatch):
    """Also if in some of them, but not in all, nothing moves in the transport of a cloud to itself."""
    pairs = [clouds(seed=seed) for seed in range(3)]
    x, y = (torch.stack(each) for each in zip(*(pair[:2] for pair in pairs), strict=True))
    x = (x * torch.tensor([1.0, 40.0, 0.01]).double()[:, None, None]).requires_grad_()
    results = []
    for looped in (2**18, 1):
        monkeypatch.setattr("lightning_wdefense.transport.entropic.problem.problem.LOOPED", looped)
        value = sinkhorn_divergence(x, y, blur=0.3, tol=1e-7)
        results.append((value, *torch.autograd.grad(value.sum(), x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@st.composite
def problems(draw):
    n, m, d = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    x, y, a, b = clouds(n, m, d, seed=draw(st.integers(0, 1000)), weighted=draw(st.booleans()))
    options = {"p": draw(st.sampled_from([1, 2])), "relative_blur": draw(st.sampled_from([0.1, 0.2, 0.7]))}
    return x, y, a, b, options


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.01, 100))
def test_invariances(problem, scale):
    x, y, a, b, options = problem
    d = x.shape[1]

    def value(x, y, a=a, b=b):
        return sinkhorn_divergence(x, y, a, b, tol=1e-6, **options).item()

    same = pytest.approx(value(x, y), rel=1e-5, abs=1e-7)
    assert value(x, y) > -1e-7
    assert value(y, x, b, a) == same
    assert value(x.flip(0), y, a.flip(0)) == same
    assert value(x + 3, y + 3) == same
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64))[0]
    assert value(x @ rotation, y @ rotation) == same
    assert value(scale * x, scale * y) / scale ** options["p"] == same


def test_blur_is_relative_to_the_typical_distance():
    x, y, a, b = clouds(weighted=True)
    for p in (1, 2):
        typical = float(a @ cost_matrix(x, y, p) @ b) ** (1 / p)
        assert sinkhorn(x, y, a, b, p=p).blur.item() == pytest.approx(0.2 * typical)
        assert sinkhorn(x, y, a, b, p=p, blur=0.37, relative_blur=3.0).blur.item() == pytest.approx(0.37)


def test_raw_features_keep_their_digits():
    """Float32 products of features far from the origin cancel; the result must not."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=rng, dtype=torch.float64)
    y = x + 0.1 * torch.randn(64, 256, generator=rng, dtype=torch.float64)
    offset = 100.0 * torch.randn(256, generator=rng, dtype=torch.float64)
    wide = sinkhorn_divergence(x, y).item()
    assert sinkhorn_divergence((x + offset).float(), (y + offset).float()).item() == pytest.approx(wide, rel=1e-3)


def test_unbalanced_discards_an_outlier():
    x = torch.zeros(10, 2)
    y = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 100.0)])
    assert sinkhorn_divergence(x, y, blur=0.1).item() > 100
    assert sinkhorn_divergence(x, y, blur=0.1, reach=1.0).item() < 1
    assert math.isfinite(sinkhorn_divergence(x, y, 3 * torch.ones(10), torch.ones(10), blur=0.1, reach=1.0).item())

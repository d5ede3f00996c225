"""Precision, and the state that must be found as it was left: grad mode, autocast, the random number generator."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_wdefense.transport import SinkhornDivergence, WarmStart, sinkhorn, sinkhorn_divergence

SOLVERS = ["native", "geomloss"]


def clouds(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=rng)
    return x.to(dtype), (x + 0.2 * torch.randn(16, 8, generator=rng)).to(dtype)


def half_square(x, y):
    return 0.5 * (x.square().sum(-1)[:, None] + y.square().sum(-1)) - x @ y.T


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"reach": 1.0}, {"cost": half_square}], ids=str)
def test_autocast_changes_nothing(options):
    def evaluate(x, y):
        x = x.clone().requires_grad_()
        value = sinkhorn_divergence(x, y, **options)
        return value, torch.autograd.grad(value, x)[0]

    value, gradient = evaluate(*clouds())
    with torch.autocast("cpu", torch.bfloat16):
        cast_value, cast_gradient = evaluate(*clouds())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(cast_value, value)
    if "cost" not in options:  # The backward pass of the caller's own cost is the caller's.
        assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_computes_in_float32_or_better(dtype):
    x, y = clouds(dtype)
    x.requires_grad_()
    value = sinkhorn_divergence(x, y)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(value, sinkhorn_divergence(x.detach().to(value.dtype), y.to(value.dtype)))


def test_mixed_precision_takes_the_better():
    x, y = clouds()
    assert sinkhorn_divergence(x, y.double()).dtype == torch.float64
    assert sinkhorn_divergence(x.bfloat16(), y, torch.full((16,), 1 / 16).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_graph_under_no_grad(solver):
    x, y = clouds()
    x.requires_grad_()
    expected = sinkhorn_divergence(x, y, solver=solver)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = sinkhorn_divergence(x, y, solver=solver)
            result = sinkhorn(x, y, solver=solver)
            assert not torch.is_grad_enabled()
        assert not value.requires_grad
        assert not result.value.requires_grad
        assert torch.equal(value, expected)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [1, 2])
def test_inference_tensors_can_be_targets(p, solver):
    x, y = clouds()
    with torch.inference_mode():
        y = y + 0
        b = torch.full((16,), 1 / 16)
    x.requires_grad_()
    sinkhorn_divergence(x, y, None, b, p=p, solver=solver).backward()
    assert x.grad.abs().sum() > 0


def test_evaluating_does_not_spoil_training():
    """Buffers are kept between calls, also from inference mode to training."""
    x, y = (torch.randn(n, 3) for n in (57, 43))  # A shape of its own, so that the buffers may be new.
    handle = WarmStart()

    def in_new_thread():
        with torch.inference_mode():
            value = sinkhorn_divergence(x, y, warm_start=handle)
        cloud = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sinkhorn_divergence(cloud, y, warm_start=handle), cloud, create_graph=True)
        gradient.square().sum().backward()
        return value, cloud.grad

    with ThreadPoolExecutor(1) as pool:
        value, gradient = pool.submit(in_new_thread).result()
    torch.testing.assert_close(value + 0, sinkhorn_divergence(x, y), rtol=1e-3, atol=0)
    assert gradient.isfinite().all()


class BrokenCostError(Exception):
    pass


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_modes_and_rng_are_left_alone(grad, solver, fails):
    x, y = clouds()
    calls = 0

    def cost(u, v):
        nonlocal calls
        calls += 1
        if fails and calls == 2:
            raise BrokenCostError
        return 0.5 * (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)

    before = torch.get_rng_state()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        if fails:
            with pytest.raises(BrokenCostError):
                sinkhorn_divergence(x, y, cost=cost, solver=solver)
        else:
            sinkhorn_divergence(x, y, cost=cost, solver=solver)
        assert torch.is_grad_enabled() == grad
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_not_changed():
    x, y = clouds()
    a = torch.full((16,), 1 / 16)
    kept = [tensor.clone() for tensor in (x, y, a)]
    sinkhorn_divergence(x, y, a, a)
    assert all(torch.equal(tensor, copied) for tensor, copied in zip((x, y, a), kept, strict=True))


def test_module_is_the_function():
    x, y = clouds()
    labels = torch.arange(16) % 4
    options = {"p": 2, "relative_blur": 0.3, "label_cost": 1.0, "reach": 2.0, "tol": 1e-4}
    divergence = SinkhornDivergence(**options)
    expected = sinkhorn_divergence(x, y, x_labels=labels, y_labels=labels.flip(0), **options)
    assert list(divergence.state_dict()) == []
    for module in (divergence, pickle.loads(pickle.dumps(divergence)), copy.deepcopy(divergence)):
        assert torch.equal(module(x, y, x_labels=labels, y_labels=labels.flip(0)), expected)
        assert repr(module) == "SinkhornDivergence(p=2, relative_blur=0.3, reach=2.0, label_cost=1.0, tol=0.0001)"
    assert repr(SinkhornDivergence(p=1, blur=0.1)) == "SinkhornDivergence(p=1, blur=0.1)"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_reduced_matmul_precision_changes_nothing_and_is_left_alone(precision, fails):
    x, y = (cloud.repeat(20, 8) for cloud in clouds())
    expected, before = sinkhorn_divergence(x, y), torch.get_float32_matmul_precision()

    class Fail(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mv:
                raise BrokenCostError
            return func(*args, **(kwargs or {}))

    try:
        torch.set_float32_matmul_precision(precision)
        if fails:
            with pytest.raises(BrokenCostError), Fail():
                sinkhorn_divergence(x, y)
        else:
            assert torch.equal(sinkhorn_divergence(x, y), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_do_not_disturb_each_other():
    pairs = [(torch.randn(80, 5) * (1 + i), torch.randn(70, 5)) for i in range(8)]
    expected = [sinkhorn_divergence(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: sinkhorn_divergence(*pairs[i % 8]), range(32)))
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))


def test_results_do_not_share_memory_with_later_calls():
    x, y = clouds()
    x.requires_grad_()
    first = sinkhorn_divergence(x, y)
    kept = sinkhorn(x, y)
    copies = [field.detach().clone() for field in kept if isinstance(field, torch.Tensor)]
    sinkhorn_divergence(3 * x, y - 1).backward()
    x.grad = None
    first.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(sinkhorn_divergence(x, y), x)[0])
    assert all(
        torch.equal(copied, field)
        for copied, field in zip(copies, [f for f in kept if isinstance(f, torch.Tensor)], strict=True)
    )


def test_inside_a_compiled_function():
    x, y = clouds()
    x.requires_grad_()

    @torch.compile(backend="eager")
    def loss(x, y):
        return 2 * sinkhorn_divergence(3 * x, y)

    (gradient,) = torch.autograd.grad(loss(x, y), x)
    (expected,) = torch.autograd.grad(2 * sinkhorn_divergence(3 * x, y), x)
    torch.testing.assert_close(gradient, expected)

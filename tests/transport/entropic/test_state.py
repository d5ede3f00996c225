"""Precision, and the state that must be found as it was left: grad mode, autocast, the random number generator."""

import copy
import functools
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.threads import one_core_each, restless

from lightning_wdefense.metrics import TransportShift
from lightning_wdefense.transport import (
    SinkhornDivergence,
    WarmStart,
    WassersteinCritic,
    critic_distance,
    sinkhorn,
    sinkhorn_divergence,
    sliced_wasserstein,
)
from lightning_wdefense.transport.clouds.precision import exact_products

SOLVERS = ["native", "geomloss"]


def clouds(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=rng)
    return x.to(dtype), (x + 0.2 * torch.randn(16, 8, generator=rng)).to(dtype)


def half_square(x, y):
    return 0.5 * (x.square().sum(-1)[:, None] + y.square().sum(-1)) - x @ y.T


@pytest.mark.parametrize(
    "options", [{}, {"p": 1}, {"reach": 1.0}, {"cost": half_square}], ids=["", "p", "reach", "cost"]
)
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


LEVELS = ("", "cuda.matmul", "mkldnn", "mkldnn.matmul", "cudnn")
PRECISIONS = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "one backend": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
NEWER = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="one setting for all before PyTorch 2.9"
)


def level(names):
    return functools.reduce(lambda at, name: getattr(at, name, None), names.split(".") if names else [], torch.backends)


def shown():
    """What PyTorch says about the precision of products, at each level of its settings."""
    settings = [getattr(level(names), "fp32_precision", None) for names in LEVELS]
    try:
        return [*settings, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
    except RuntimeError:  # settings that the old names cannot express
        return settings


@pytest.fixture(
    params=[*list(PRECISIONS)[:2], *(pytest.param(name, marks=NEWER) for name in list(PRECISIONS)[2:])],
)
def reduced_precision(request):
    PRECISIONS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for names in LEVELS[:4]:
        if hasattr(level(names), "fp32_precision"):
            level(names).fp32_precision = "none"


def test_reduced_precision_is_left_at_each_level(reduced_precision):
    """Also where two backends differ, and where one follows the setting above it."""
    before, seen = shown(), []
    with exact_products():
        seen.append(shown())
        sinkhorn_divergence(*clouds())
        seen.append(shown())
    assert seen[0] == seen[1]
    assert not {"tf32", "bf16", "medium", "high", True} & {*seen[0][1:2], *seen[0][3:4], *seen[0][5:]}
    assert shown() == before
    if reduced_precision == "all backends":
        torch.backends.fp32_precision = "ieee"
        assert shown()[:4] == ["ieee"] * 4


def test_the_first_thread_in_forbids_and_the_last_one_out_allows():
    torch.set_float32_matmul_precision("medium")
    inside, done = threading.Barrier(2), threading.Barrier(2)

    def other():
        with exact_products():
            inside.wait(10)
            done.wait(10)

    try:
        with ThreadPoolExecutor(1) as pool:
            with exact_products():
                pool.submit(other)
                inside.wait(10)
            assert torch.get_float32_matmul_precision() == "highest"  # which compiled code may ask for meanwhile
            done.wait(10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"reach": 0.5}], ids=["balanced", "unbalanced"])
def test_the_default_dtype_changes_nothing(options, dtype):
    """Which Trainers of a "true" precision set while a step runs."""
    x, y = (torch.randn(3, n, 4, generator=torch.Generator().manual_seed(n)) for n in (20, 15))
    y[1] /= 10  # so that the problems of the batch take different numbers of temperatures
    expected = sinkhorn_divergence(x, y, relative_blur=0.05, **options)
    try:
        torch.set_default_dtype(dtype)
        found = sinkhorn_divergence(x, y, relative_blur=0.05, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_forks_in_the_middle():
    """As the workers of a DataLoader do, while another thread computes: the child finds the setting as the user left it."""
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_products():
            child = os.fork()
            if child == 0:
                right = torch.get_float32_matmul_precision() == "medium"
                with exact_products():
                    right = right and torch.get_float32_matmul_precision() == "highest"
                os._exit(0 if right and torch.get_float32_matmul_precision() == "medium" else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_float32_matmul_precision("highest")


FROM_THREADS = {
    "divergence": sinkhorn_divergence,
    "p=1": functools.partial(sinkhorn_divergence, p=1, relative_blur=0.05),
    "reach": functools.partial(sinkhorn_divergence, reach=0.5),
    "max": functools.partial(sliced_wasserstein, directions="max", n_projections=8),
    "critic": lambda x, y: critic_distance(x, y, steps=5).value,
    "penalised critic": lambda x, y: (
        WassersteinCritic(5, lipschitz="gradient-penalty", seed=len(x)).objective(x, y).loss.detach()
    ),
    "shift": lambda x, y: TransportShift().set_dtype(torch.float32)(x[:50], y[:50]),
}


@pytest.mark.parametrize("function", FROM_THREADS.values(), ids=FROM_THREADS)
def test_eight_threads_do_not_disturb_each_other(function):
    """Bit for bit, nor whoever draws random numbers, nor a thread in which the default dtype is another one."""
    rng = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(60 + i, 5, generator=rng), torch.randn(50, 5, generator=rng)) for i in range(8)]
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with restless(1e-5):
        expected = [function(*pair) for pair in pairs]
        try:
            torch.set_default_dtype(torch.float64)
            with one_core_each(8) as pool:
                results = list(pool.map(lambda i: function(*pairs[i % 8]), range(16)))
        finally:
            torch.set_default_dtype(dtype)
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))
    assert torch.equal(torch.get_rng_state(), before)


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

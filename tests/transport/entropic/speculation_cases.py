"""Checks of the speculative evaluation: with NumPy in the place of the kernels, in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from lightning_wdefense.transport import WarmStart, sinkhorn, sinkhorn_divergence
from lightning_wdefense.transport.entropic import evaluation, triton
from lightning_wdefense.transport.entropic.gpu import graphs as recorded
from lightning_wdefense.transport.entropic.gpu import speculation
from lightning_wdefense.transport.entropic.triton import pairwise, small, streaming, symmetric

INTERPRETER = isinstance(symmetric.average, InterpretedFunction)
"""Whether kernels run in the interpreter, which takes a second for most."""


@dataclass(frozen=True)
class Case:
    """Clouds with weights and labels, and how they are compared."""

    n: int = 20
    m: int = 20
    depth: int = 3
    batch: tuple[int, ...] = ()
    function: Callable[..., Any] = sinkhorn_divergence
    weights: str | None = None
    """``"zeros"`` has some of them, ``"padding"`` has NaN there, ``"masses"`` has weights whose sums differ."""
    labels: str | None = None
    dtype: torch.dtype = torch.float32
    shift: float = 0.5
    offset: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Points and weights, and labels, on the CPU."""
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(*self.batch, self.n, self.depth, generator=rng) + self.offset
        y = 0.8 * torch.randn(*self.batch, self.m, self.depth, generator=rng) + self.shift + self.offset
        x, y = x.to(self.dtype), y.to(self.dtype)
        a = b = None
        if self.weights is not None:
            a, b = (0.1 + torch.rand(*self.batch, size, generator=rng) for size in (self.n, self.m))
            if self.weights != "random":
                a[..., 3::5], b[..., 2::7] = 0, 0
            a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
            if self.weights == "masses":
                a = 1.5 * a
        if self.weights == "padding" and a is not None and b is not None:
            x, y = (cloud.masked_fill((w == 0)[..., None], torch.nan) for cloud, w in ((x, a), (y, b)))
        labels = {}
        if self.labels is not None:
            for name, size in (("x_labels", self.n), ("y_labels", self.m)):
                soft = torch.rand(*self.batch, size, 3, generator=rng).softmax(-1)
                labels[name] = soft if self.labels == "soft" else soft.argmax(-1)
        return [x, y, a, b], labels

    def gradients(
        self, device: str, dtype: torch.dtype | None = None, **settings: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Value and gradients in all that was given."""
        given, labels = self.inputs()
        leaves = [
            each if each is None else each.to(device, dtype or each.dtype, copy=True).requires_grad_() for each in given
        ]
        labels = {name: each.to(device) for name, each in labels.items()}
        value = self.function(*leaves, **labels, **{**self.options, **settings})
        value = value if isinstance(value, Tensor) else value.value
        gradients = torch.autograd.grad(value.sum(), [leaf for leaf in leaves if leaf is not None])
        return value.detach().cpu().double(), [each.cpu().double().nan_to_num() for each in gradients]


LABELS = {"label_cost": 1.0}

SMALL = {
    "uniform": Case(),
    "one batch": Case(batch=(1,)),
    "rectangular": Case(m=17),
    "one row": Case(n=1, m=5),
    "one column": Case(n=5, m=1),
    "one point": Case(n=1, m=1),
    "entropic": Case(function=sinkhorn),
    "entropic, rectangular": Case(m=17, function=sinkhorn, weights="zeros"),
    "weighted": Case(m=17, weights="random"),
    "zero weights": Case(weights="zeros"),
    "padding": Case(m=17, weights="padding"),
    "batch": Case(n=12, m=12, batch=(3,)),
    "batch, rectangular": Case(n=12, m=10, batch=(3,), weights="padding"),
    "labels": Case(m=17, labels="hard", options=LABELS),
    "soft labels": Case(labels="soft", options=LABELS, weights="zeros"),
    "labels, batch": Case(n=10, m=10, batch=(2,), labels="hard", options=LABELS),
    "cosine": Case(options={"cost": "cosine"}),
    "reach": Case(options={"reach": 1.0}),
    "reach, weighted": Case(m=17, weights="masses", options={"reach": 0.7}),
    "reach, batch": Case(n=10, m=10, batch=(2,), weights="masses", options={"reach": 2.0}),
    "p1": Case(options={"p": 1}),
    "p1, labels": Case(m=17, labels="hard", weights="zeros", options={"p": 1, **LABELS}),
    "p1, reach": Case(options={"p": 1, "reach": 1.0}),
    "half": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16, weights="zeros"),
    "far from the origin": Case(offset=1000.0),
    "blur": Case(options={"blur": 0.3}),
    "annealed": Case(n=14, m=14, options={"relative_blur": 0.05}),
    "accurate": Case(options={"tol": 3e-5}),
    "deep": Case(n=18, m=16, depth=33),
}
"""Small enough for the interpreter."""

LARGE = {
    "64": Case(n=64, m=64, depth=10, batch=(16,)),
    "32 x 64": Case(n=64, m=64, depth=50, batch=(32,), weights="zeros"),
    "128": Case(n=128, m=128, depth=2),
    "128, weighted": Case(n=128, m=100, depth=20, weights="padding"),
    "8 x 256": Case(n=256, m=256, depth=64, batch=(8,)),
    "8 x 256, rectangular": Case(n=256, m=200, depth=8, batch=(8,), weights="zeros"),
    "300": Case(n=300, m=257, weights="zeros"),
    "512": Case(n=512, m=512, depth=64),
    "512, small blur": Case(n=512, m=512, options={"relative_blur": 0.05}),
    "512, images": Case(n=512, m=512, depth=3072, shift=0.1),
    "1024": Case(n=1024, m=1024),
    "1024, deep": Case(n=1024, m=1024, depth=512, weights="random"),
    "1024, reach": Case(n=1024, m=900, weights="masses", options={"reach": 1.0}),
    "1024, reach, square": Case(n=1024, m=1024, options={"reach": 1.0}),
    "1024, labels": Case(n=1024, m=1024, labels="hard", options=LABELS),
    "1024, soft labels": Case(n=1000, m=1000, labels="soft", options=LABELS),
    "1024, p1": Case(n=1024, m=1024, options={"p": 1}),
    "1024, cosine": Case(n=1024, m=1024, depth=64, options={"cost": "cosine"}),
    "1024, half": Case(n=1024, m=1024, dtype=torch.float16),
    "1024, entropic": Case(n=1024, m=1024, function=sinkhorn),
    "1024, small blur": Case(n=1024, m=1024, options={"relative_blur": 0.05}),
    "2048": Case(n=2048, m=2048),
    "2048, rectangular": Case(n=2000, m=1500, weights="zeros"),
}
"""For a GPU, with several programs for each problem of more than 128 points."""


def answer(cost: Any, weights: Any, potential: Any, eps: Any, share: Any) -> Any:
    """The exact answer of the rows to a potential of the columns."""
    exponents = (potential / eps + numpy.log(weights))[:, None] - cost / eps[:, None]
    top = exponents.max(-1)
    return -share * eps * (top + numpy.log(numpy.exp(exponents - top[..., None]).sum(-1)))


@numpy.errstate(all="ignore")
def solved_by_numpy(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho: float,
    tol: float,
    max_iter: int,
    start: Tensor | None,
    found: Tensor,
    report: Tensor,
    *,
    within: bool,
) -> None:
    """Plain Sinkhorn iterations in float64, averaged within a measure, which end where a step is small, or NaN."""
    cost = cost[..., : b.shape[-1]]  # without what its rows are filled up with
    costs, rows, columns, temperatures = (each.double().numpy() for each in (cost, a, b, eps.unsqueeze(-1)))
    share = 1 / (1 + temperatures / rho)
    g = numpy.zeros_like(columns) if start is None else start.double().numpy()
    going, n_iter = True, 0
    while going and n_iter < max_iter:
        f = answer(costs, columns, g, temperatures, share)
        step = 0.5 * (f - g) if within else answer(costs.swapaxes(-1, -2), rows, f, temperatures, share) - g
        g, error = g + step, abs(step / temperatures).max(-1)
        going, n_iter = (error > tol).any(), n_iter + 1
    found.numpy()[:], report.numpy()[:, 0], report.numpy()[:, 1] = g, error, n_iter


def small_launch(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    rho: float,
    mean: Tensor,
    tol: float,
    max_iter: int,
    start: Tensor | None,
    slabs: Any,
    *out: Tensor,
) -> None:
    """As :func:`~lightning_wdefense.transport.entropic.triton.small.launch`."""
    solved_by_numpy(cost, a, b, eps, rho, tol, max_iter, start, *out, within=False)


def symmetric_launch(
    cost: Tensor, a: Tensor, eps: Tensor, rho: float, tol: float, max_iter: int, slabs: Any, *out: Tensor
) -> None:
    """As :func:`~lightning_wdefense.transport.entropic.triton.symmetric.launch`."""
    solved_by_numpy(cost, a, a, eps, rho, tol, max_iter, None, *out, within=True)


def pairwise_costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """As :func:`~lightning_wdefense.transport.entropic.triton.pairwise.pairwise_costs`."""
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)).double().norm(dim=-1) ** p / p).float()


def log_sums(x: Tensor, y: Tensor, exponents: Tensor, eps: float) -> Tensor:
    """As :func:`~lightning_wdefense.transport.entropic.triton.streaming.log_sums`."""
    return scores(x, y, exponents, eps).logsumexp(1).float()


def weighted_points(x: Tensor, y: Tensor, exponents: Tensor, sums: Tensor, eps: float) -> Tensor:
    """As :func:`~lightning_wdefense.transport.entropic.triton.streaming.weighted_points`."""
    return ((scores(x, y, exponents, eps) - sums.double().unsqueeze(-1)).exp() @ y.double()).float()


def scores(x: Tensor, y: Tensor, exponents: Tensor, eps: float) -> Tensor:
    """Logarithms of the kernel's entries, times weights."""
    return exponents.double() - 0.5 * torch.cdist(x.double(), y.double()).square() / eps


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """NumPy and PyTorch in the place of the kernels, for the checks of what is around them: in the interpreter these take minutes."""
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # on a CPU kernels are asked for only then
        mock.patch.object(triton, "supported", return_value=True),
        mock.patch.object(triton, "_failed", set()),
        mock.patch.object(small, "launch", small_launch),
        mock.patch.object(symmetric, "launch", symmetric_launch),
        mock.patch.object(pairwise, "pairwise_costs", pairwise_costs),
        mock.patch.object(streaming, "log_sums", log_sums),
        mock.patch.object(streaming, "weighted_points", weighted_points),
    ):
        yield


@contextlib.contextmanager
def careful_calls() -> Iterator[list[int]]:
    """Counts how often the careful way was taken."""
    calls: list[int] = []
    careful = evaluation._solve

    def counted(*args: Any) -> Any:
        calls.append(1)
        return careful(*args)

    with mock.patch.object(evaluation, "_solve", counted):
        yield calls


def check_value(name: str, case: Case, device: str = "cpu") -> None:
    """Value and gradients are those of the careful way in float64, and the careful way was not taken."""
    with careful_calls() as calls:
        value, gradients = case.gradients(device)
    assert not calls, f"{name} was not found by speculation"
    with careful_calls() as calls:
        exact, exact_gradients = case.gradients("cpu", torch.float64, tol=1e-5, max_iter=3000)
    assert calls
    agree(name, value, exact, gradients, exact_gradients, case.dtype)


def agree(
    name: str,
    value: Tensor,
    exact: Tensor,
    gradients: list[Tensor],
    exact_gradients: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Values to 0.1%, gradients to 1%."""
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    for i, (gradient, right) in enumerate(zip(gradients, exact_gradients, strict=True)):
        off = (gradient - right).norm()
        assert off < (0.01 + 4 * torch.finfo(dtype).eps) * right.norm() + 1e-6, (name, i, off, right.norm())


def check_states(device: str = "cpu") -> None:
    """Graphs, modes and warm starts are as on the careful way."""
    (x, y, _, _), _ = Case(m=17).inputs()
    x, y = x.to(device), y.to(device)
    with careful_calls() as calls:
        result = sinkhorn(x, y)
        assert not result.value.requires_grad
        assert result.n_iter > 3
        assert bool(result.converged)
        assert result.f.shape == (20,)
        assert result.g.shape == (17,)

        # A warm start saves iterations, and one that is far away does no harm.
        handle = WarmStart()
        first = sinkhorn(x, y, warm_start=handle)
        again = sinkhorn(x, y + 0.01, warm_start=handle)
        assert again.n_iter < first.n_iter
        handle.potential = 50 * torch.sin(torch.arange(17.0, device=device))[None]
        torch.testing.assert_close(sinkhorn(x, y, warm_start=handle).value, first.value, rtol=1e-4, atol=1e-5)

        # Modes.
        leaf = x.clone().requires_grad_()
        with torch.no_grad():
            assert not sinkhorn_divergence(leaf, y).requires_grad
        with torch.inference_mode():
            inside = sinkhorn_divergence(leaf, y)
            made_inside = x.clone()
        torch.testing.assert_close(inside.clone(), sinkhorn_divergence(x, y))
        (gradient,) = torch.autograd.grad(sinkhorn_divergence(leaf, y), leaf)
        (same,) = torch.autograd.grad(sinkhorn_divergence(leaf, y.clone()), leaf)
        torch.testing.assert_close(gradient, same)
        torch.testing.assert_close(sinkhorn_divergence(made_inside, y), inside.clone())

        # One of the two asks for a gradient.
        other = y.clone().requires_grad_()
        torch.autograd.grad(sinkhorn_divergence(x, other), other)
        weights = torch.full((17,), 1 / 17, device=device, requires_grad=True)
        (of_b,) = torch.autograd.grad(sinkhorn_divergence(x, y, None, weights, reach=1.0), weights)

        # Second derivatives.
        def curvature(dtype: torch.dtype, **settings: float) -> Tensor:
            point = x.to(dtype, copy=True).requires_grad_()
            (slope,) = torch.autograd.grad(
                sinkhorn_divergence(point, y.to(dtype), **settings), point, create_graph=True
            )
            return torch.autograd.grad(slope.square().sum(), point)[0].double()

        curved = curvature(torch.float32)
    assert not calls, "not found by speculation"
    exact = curvature(torch.float64, tol=1e-8)
    assert (curved - exact).norm() < 0.02 * exact.norm()
    wide = weights.detach().double().requires_grad_()
    (exact_of_b,) = torch.autograd.grad(
        sinkhorn_divergence(x.double(), y.double(), None, wide, reach=1.0, tol=1e-8), wide
    )
    assert (of_b.double() - exact_of_b).norm() < 0.01 * exact_of_b.norm()

    # Equal clouds are no distance apart, to the tolerance.
    assert abs(float(sinkhorn_divergence(x, x.clone()))) < 1e-5

    # What the kernels are not made for goes the careful way.
    for settings in ({"cost": lambda x, y: torch.cdist(x, y)}, {"max_iter": 2}):
        with careful_calls() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sinkhorn_divergence(x, y, **settings)
        assert calls


def check_errors(device: str = "cpu") -> None:
    """Errors are the same as without speculation."""
    (x, y, a, b), labels = Case(n=6, m=5, weights="zeros", labels="soft").inputs()
    assert a is not None
    assert b is not None
    x_labels, y_labels = labels.values()
    soft = {"x_labels": 2 * x_labels, "y_labels": y_labels, "label_cost": 1.0}
    bad = {
        "NaN": (x.clone().fill_(torch.nan), y, None, None, {}),
        "infinite": (x, y.index_fill(0, torch.tensor([3]), torch.inf), None, None, {"reach": 1.0, "blur": 0.5}),
        "NaN with weight": (x.index_fill(0, torch.tensor([0]), torch.nan), y, a, b, {}),
        "negative weight": (x, y, a - 0.01, b, {}),
        "NaN weight": (x, y, a * torch.nan, b, {"reach": 1.0}),
        "infinite weight": (x, y, a + torch.inf, b, {"reach": 1.0}),
        "no weight": (x, y, a * 0, b, {"reach": 1.0}),
        "masses": (x, y, 1.1 * a, b, {}),
        "mass of one": (x, y, 1.1 * a, None, {}),
        "soft labels": (x, y, None, None, soft),
        "missing labels": (x, y, None, None, {"label_cost": 1.0}),
        "shapes": (x, y[:, :2], None, None, {}),
        "dtype": (x.long(), y, None, None, {}),
        "no tensor": (x.tolist(), y, None, None, {}),
    }
    for name, (*given, options) in bad.items():
        moved = [each.to(device) if isinstance(each, Tensor) else each for each in given]
        options = {key: each.to(device) if isinstance(each, Tensor) else each for key, each in options.items()}
        if INTERPRETER:
            options["max_iter"] = 20  # some of these never converge
        # Both read their arguments alike; in the interpreter the shorter one will do.
        for function in (sinkhorn,) if INTERPRETER else (sinkhorn, sinkhorn_divergence):
            messages = []
            for guess in (evaluation._speculate, lambda *args: None):
                with mock.patch.object(evaluation, "_speculate", guess):
                    try:
                        function(*moved, **options)
                        raise AssertionError(f"{name}: no error")
                    except (TypeError, ValueError) as error:
                        messages.append(f"{type(error).__name__}: {error}")
            assert messages[0] == messages[1], (name, messages)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """No attempt is a graph, which would run the kernels that it was recorded with."""
    with mock.patch.object(recorded, "DEVICES", frozenset()):
        yield


@unrecorded()
def check_garbage(device: str = "cpu") -> None:
    """Kernels that find the wrong potentials, or nothing, cost time but no accuracy."""
    case = Case(m=20, weights="zeros")
    exact, exact_gradients = case.gradients("cpu", torch.float64, tol=1e-8)

    def noise(module: Any, value: float) -> Callable[..., None]:
        launch = module.launch

        def wrong(*args: Any) -> None:
            launch(*args)
            found = args[-2]
            found += value * torch.sin(torch.arange(found.numel(), device=found.device)).reshape(found.shape)

        return wrong

    for module in (small, symmetric):
        for value in (0.1, 100.0, torch.nan):
            with mock.patch.object(module, "launch", noise(module, value)), careful_calls() as calls:
                found, gradients = case.gradients(device)
            assert calls, (module.__name__, value)
            agree(f"{module.__name__} {value}", found, exact, gradients, exact_gradients)


@unrecorded()
def check_failing(device: str = "cpu") -> None:
    """A kernel that cannot be compiled is reported once, and PyTorch takes over."""
    (x, y, _, _), _ = Case().inputs()
    x, y = x.to(device), y.to(device)
    right = sinkhorn_divergence(x, y)

    def fails(*args: Any) -> None:
        raise RuntimeError("no such instruction\nand a long listing")

    with mock.patch.object(triton, "_failed", set()), mock.patch.object(symmetric, "launch", fails):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [sinkhorn_divergence(x, y) for _ in range(2)]
        assert len([each for each in caught if "PyTorch solves them" in str(each.message)]) == 1, caught
        for value in found:
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


def check_waits_once(case: Case) -> None:
    """All that is queued on a GPU is queued without waiting for it, but for one look at the end."""
    for _ in range(3):  # compiles, fills PyTorch's caches, and records
        case.gradients("cuda")
    given, labels = case.inputs()
    leaves = [each if each is None else each.cuda().requires_grad_() for each in given]
    labels = {name: each.cuda() for name, each in labels.items()}
    looks = []
    look = speculation.look

    def seen(evidence: Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        looks.append(1)
        values = look(evidence)
        torch.cuda.set_sync_debug_mode("error")
        return values

    with mock.patch.object(speculation, "look", seen):
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = case.function(*leaves, **labels, **case.options)
            value = value if isinstance(value, Tensor) else value.value
            torch.autograd.grad(value.sum(), [leaf for leaf in leaves if leaf is not None])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(looks) == 1


@contextlib.contextmanager
def recordings(device: str) -> Iterator[list[int]]:
    """Counts graphs as they are recorded; where there are none, a stand-in does the work anew each time."""
    made: list[int] = []
    record = recorded.record

    def counted(compute: Callable[[], Any], where: torch.device) -> tuple[Callable[[], Any], Any]:
        made.append(1)
        if device == "cuda":
            return record(compute, where)
        with Reads() as reads:
            result = compute()
        alive.append(reads.found)
        return lambda: result[0].copy_(compute()[0]), result

    with (
        mock.patch.object(recorded, "DEVICES", frozenset({device})),
        mock.patch.object(recorded, "record", counted),
        mock.patch.dict(recorded._graphs, clear=True),
        mock.patch.object(recorded, "_recent", type(recorded._recent)(maxlen=recorded.RECENT)),
    ):
        yield made


alive: list[list[weakref.ref[Tensor]]] = []
"""What each recording read and had not made, for the stand-in."""


class Reads(TorchDispatchMode):
    """Takes note of tensors that are read inside and were not made there: a graph reads them later, wherever they have been."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[weakref.ref[Tensor]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and each.ndim and each.untyped_storage()._cdata not in self._made:
                self.found.append(weakref.ref(each))
        result = func(*args, **(kwargs or {}))
        self._made |= {each.untyped_storage()._cdata for each in tree_leaves(result) if isinstance(each, Tensor)}
        return result


def check_kept_alive() -> None:
    """A graph holds all that it reads, weights that nobody gave as well."""
    for name in ("uniform", "padding", "soft labels"):
        case = replace(SMALL[name], n=6, m=6)
        given, labels = case.inputs()
        x, y, a, b = given
        alive.clear()
        with recordings("cpu"):
            for _ in range(2):
                sinkhorn_divergence(x, y, a, b, **labels, **case.options)
            (graph,) = recorded._graphs.values()
            graph._replay = None  # and with it the stand-in's closure, which a graph has not
            gc.collect()
            assert alive[0], name
            assert all(each() is not None for each in alive[0]), name


def moved(case: Case, step: int) -> Case:
    """The same with other clouds."""
    return replace(case, shift=case.shift + 0.1 * step)


RECORDED = (
    "uniform",
    "entropic",
    "batch, rectangular",
    "padding",
    "soft labels",
    "reach, weighted",
    "p1, labels",
    "half",
)


def check_recorded(device: str = "cpu") -> None:
    """Graphs find for other values of the same shape what attempts by themselves find, and each call has results of its own."""
    for name in RECORDED[2:7:2] if INTERPRETER else RECORDED:
        case = SMALL[name]
        if device == "cpu":
            case = replace(case, n=6, m=6 if case.n == case.m else 5, options={"relative_blur": 0.5, **case.options})
        with unrecorded():
            expected = [moved(case, step).gradients(device) for step in range(4)]
        with recordings(device) as made, careful_calls() as calls:
            found = [moved(case, step).gradients(device) for step in range(4)]
            assert len(made) == 1, (name, made)  # by the second call
        assert not calls, name
        for one, other in zip(found, expected, strict=True):
            agree(name, one[0], other[0], one[1], other[1])

    # Results that somebody keeps are not those of later calls.
    (x, y, _, _), labels = Case(n=6, m=6, labels="hard").inputs()
    x, y = x.to(device), y.to(device)
    few: dict[str, Any] = {"relative_blur": 0.5}  # iterations
    with unrecorded():
        expected = [sinkhorn(x, y + step, **few).f for step in range(4)]
    with recordings(device) as made:
        found = [sinkhorn(x, y + step, **few).f for step in range(4)]
        assert made
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    # What differs in anything is another problem.
    labels = {key: each.to(device) for key, each in labels.items()}
    with recordings(device) as made:
        for settings in ({}, {"blur": 0.3}, {"reach": 1.0}, {"label_cost": 1.0, **labels}, {"tol": 1e-3}):
            sinkhorn_divergence(x, y, **few, **settings)
        sinkhorn_divergence(x.clone().requires_grad_(), y, **few)
        sinkhorn(x, y, **few)
        sinkhorn_divergence(x[:-1], y, **few)
        assert not made
        for _ in range(2):
            sinkhorn_divergence(x, y, **few)
        assert len(made) == 1
        assert len(recorded._graphs) == 1

    # In all modes, with second derivatives and warm starts: too slow for the interpreter.
    with recordings(device) as made:
        for _ in range(0 if INTERPRETER else 2):
            check_states(device)
        assert bool(made) == (not INTERPRETER)
        assert len(recorded._graphs) <= recorded.KEPT

    # What cannot be recorded is told once, and works.
    def fails(*args: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    right = sinkhorn_divergence(x, y, **few)
    with recordings(device), mock.patch.object(recorded, "record", fails), careful_calls() as calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [sinkhorn_divergence(x, y, **few) for _ in range(4)]
        recorded._refused.clear()
        assert not calls
        assert ["not permitted" in str(each.message) for each in caught] == [True], caught
        for value in found:
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


GROUPS: dict[str, Callable[..., None]] = {
    "states": check_states,
    "errors": check_errors,
    "garbage": check_garbage,
    "failing": check_failing,
    "recorded": check_recorded,
    "kept alive": lambda device="cpu": check_kept_alive() if device == "cpu" else None,
}


def check_group(name: str, device: str = "cpu") -> None:
    """The checks of a group, by its name, which another process can be given."""
    GROUPS[name](device)

"""The sides of the Sinkhorn benchmark: how each library computes the divergence and its gradients, and its settings.

Settings come in ladders, from cheap and coarse to dear and exact; the benchmark climbs each and keeps the fastest
setting that is accurate enough. Everything is float32, but for what mdot-tnt itself does in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.sinkhorn.problems import half_squared_distance

Setting = dict[str, Any]
Call = Callable[[], tuple[Any, Any, Any]]
Solve = Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]

OURS_TOLS = (2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5)
GEOMLOSS_SCALINGS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998)
POT_THRESHOLDS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7)
OTT_THRESHOLDS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
MDOT_EXPONENTS = (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
UNLIMITED = 100_000
"""Iterations of the peers that a time limit can interrupt."""


@dataclass(frozen=True)
class Side:
    """One library. ``prepare(setting, x, y, blur)`` gives a call without arguments: ``(value, grad_x, grad_y)``.

    Clouds are float32, ``(N, D)`` or ``(B, N, D)``. What happens in ``prepare`` is not timed. A ``fixed`` side has one
    setting, and is reported with the errors that it has. One that is not ``interruptible`` bounds its own iterations.
    """

    name: str
    ladders: list[list[Setting]] = field(repr=False)
    prepare: Callable[[Setting, Tensor, Tensor, float], Call] = field(repr=False)
    fixed: bool = False
    interruptible: bool = True


def our_sides() -> list[Side]:
    """Ours at every tolerance, and as it comes."""
    ladder = [{"tol": tol} for tol in OURS_TOLS]
    return [Side("ours", [ladder], _ours), Side("ours default", [[{}]], _ours, fixed=True)]


@functools.cache
def peer_sides(device: str) -> list[Side]:
    """Every peer that can run on the device."""
    found, makers = [], {"geomloss": _geomloss_sides, "ot": _pot_sides, "ott": _ott_sides, "mdot_tnt": _mdot_sides}
    if device == "cuda":
        makers["flash_sinkhorn"] = _flash_sides
    for module, make in makers.items():
        if find_spec(module) is None:
            print(f"skipped: {module} is not installed")
        elif module == "ott" and not _jax_runs_on(device):
            print(f"skipped: ott, because jax does not run on {device}")
        else:
            found += make()
    return found


def _through_autograd(divergence: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Call:
    x, y = (points.detach().clone().requires_grad_() for points in (x, y))

    def call() -> tuple[Tensor, Tensor, Tensor]:
        value = divergence(x, y)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    return call


def _ours(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    from lightning_wdefense.transport import sinkhorn_divergence

    return _through_autograd(functools.partial(sinkhorn_divergence, blur=blur, **setting), x, y)


def _geomloss_sides() -> list[Side]:
    ladder = [{"scaling": scaling} for scaling in GEOMLOSS_SCALINGS]
    return [Side("geomloss", [ladder], _geomloss), Side("geomloss default", [[{}]], _geomloss, fixed=True)]


def _geomloss(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    from geomloss import SamplesLoss

    return _through_autograd(SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized", **setting), x, y)


def _by_envelope(solve: Solve, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from three solves, costs ``(B, N, M)`` to dual values ``(B,)`` and plans, with explicit gradients."""
    shape = x.shape
    x, y = (points.reshape(-1, *points.shape[-2:]) for points in (x, y))
    costs = [half_squared_distance(x, y), half_squared_distance(x, x), half_squared_distance(y, y)]
    (value, plan), (value_x, plan_x), (value_y, plan_y) = solve(costs)
    grad_x = plan.sum(-1, keepdim=True) * x - plan @ y - _self_gradient(plan_x, x)
    grad_y = plan.sum(-2)[..., None] * y - plan.mT @ x - _self_gradient(plan_y, y)
    return value - 0.5 * (value_x + value_y), grad_x.view(shape), grad_y.view(shape)


def _self_gradient(plan: Tensor, points: Tensor) -> Tensor:
    """Half the gradient of the transport of a cloud to itself, which depends on it twice."""
    plan = 0.5 * (plan + plan.mT)
    return plan.sum(-1, keepdim=True) * points - plan @ points


def _one_by_one(solve: Callable[[Tensor], tuple[Tensor, Tensor]], costs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    solutions = [[solve(problem) for problem in cost] for cost in costs]
    return [tuple(torch.stack(part) for part in zip(*each, strict=True)) for each in solutions]


def _dual_value(log_u: Tensor, log_v: Tensor, eps: float) -> Tensor:
    """Dual value of scalings whose plan ``u K v`` has uniform marginals."""
    sizes = math.log(log_u.shape[-1]) + math.log(log_v.shape[-1])
    return eps * (log_u.mean(-1) + log_v.mean(-1) + sizes)


def _pot_sides() -> list[Side]:
    # Annealing first: where it is needed, it shows the others to be too slow.
    methods = (
        "sinkhorn_epsilon_scaling",
        "sinkhorn_stabilized",
        "sinkhorn_log",
        "log_sinkhorn_stacked",
        "sinkhorn",
        "sinkhorn_stacked",
    )
    ladders = [[{"method": method, "stopThr": threshold} for threshold in POT_THRESHOLDS] for method in methods]
    return [Side("POT", ladders, _pot)]


def _pot(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    method, threshold = setting["method"], setting["stopThr"]
    if method.endswith("stacked"):
        solve = functools.partial(_pot_stacked, eps=blur**2, log_domain=method.startswith("log"), threshold=threshold)
    else:
        solve = functools.partial(
            _one_by_one, functools.partial(_pot_single, eps=blur**2, method=method, threshold=threshold)
        )
    return lambda: _by_envelope(solve, x, y)


def _pot_single(cost: Tensor, eps: float, method: str, threshold: float) -> tuple[Tensor, Tensor]:
    import ot

    a, b = (torch.full((size,), 1 / size, device=cost.device) for size in cost.shape)
    options = {"numItermax": UNLIMITED, "stopThr": threshold, "log": True, "warn": False}
    if method == "sinkhorn_epsilon_scaling":
        # From its default, 1e4, float32 loses the potentials to rounding.
        options |= {"numItermax": 100, "epsilon0": float(cost.max())}
    plan, log = ot.sinkhorn(a, b, cost, eps, method=method, **options)
    if method == "sinkhorn":
        log_u, log_v = log["u"].log(), log["v"].log()
    elif method == "sinkhorn_log":
        log_u, log_v = log["log_u"], log["log_v"]
    else:
        log_u, log_v = log["alpha"] / eps, log["beta"] / eps
    return _dual_value(log_u, log_v, eps), plan


def _pot_stacked(costs: list[Tensor], eps: float, log_domain: bool, threshold: float) -> list[tuple[Tensor, Tensor]]:
    """All three transports in one batch, which saves small problems most of the overhead."""
    from ot.batch import bregman_log_projection_batch, bregman_projection_batch

    logits = -torch.cat(costs) / eps
    a, b = (torch.full((len(logits), size), 1 / size, device=logits.device) for size in logits.shape[1:])
    options = {"a": a, "b": b, "max_iter": UNLIMITED, "tol": threshold}
    if log_domain:
        result = bregman_log_projection_batch(logits, **options)
        log_u, log_v = result["potentials"]
    else:
        result = bregman_projection_batch(logits.exp(), **options)
        log_u, log_v = (scaling.log() for scaling in result["potentials"])
    values = _dual_value(log_u, log_v, eps)
    return list(zip(values.chunk(3), result["T"].chunk(3), strict=True))


def _mdot_sides() -> list[Side]:
    dtypes = "float32", "float64"
    return [Side("mdot-tnt", [[{"p": p, "dtype": dtype} for p in MDOT_EXPONENTS] for dtype in dtypes], _mdot)]


def _mdot(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    """Its own solver for all three, from potentials; ``p`` sets its tolerance, ``entropy / gamma^p``."""
    from mdot_tnt.batched import _batched_mdot
    from mdot_tnt.mdot import mdot

    def solve(costs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [_solve(cost.to(getattr(torch, setting["dtype"]))) for cost in costs]

    def _solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        # It wants costs in [0, 1].
        scale = float(cost.max())
        gamma, unit = scale / blur**2, cost / scale
        a, b = (
            torch.full((len(cost), size), 1 / size, dtype=cost.dtype, device=cost.device) for size in cost.shape[1:]
        )
        if len(cost) == 1:
            u, v, gamma, *_ = mdot(a[0], b[0], unit[0], gamma, p=setting["p"])
            u, v = u[None], v[None]
        else:
            u, v, reached, *_ = _batched_mdot(a, b, unit, gamma, p=setting["p"])
            gamma = reached[:, None, None]
        plan = (u[:, :, None] + v[:, None, :] - gamma * unit).exp().float()
        return _dual_value(u, v, blur**2).float(), plan

    return lambda: _by_envelope(solve, x, y)


def _jax_runs_on(device: str) -> bool:
    if find_spec("jax") is None:
        return False
    import jax

    return jax.default_backend() == {"cpu": "cpu", "cuda": "gpu"}[device]


def _ott_sides() -> list[Side]:
    import jax

    # On a GPU its matrix products would be rounded to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    accelerations = "momentum", "adaptive", "anderson", "plain"
    log_domain = itertools.product([True], accelerations, [0.8, 0.95, None], [5, 10])
    scalings = itertools.product([False], accelerations, [None], [5, 10])
    names = "lse_mode", "acceleration", "decay", "inner_iterations"
    variants = [dict(zip(names, values, strict=True)) for values in itertools.chain(log_domain, scalings)]
    return [
        Side(
            "OTT-JAX",
            [[{**each, "threshold": t} for t in OTT_THRESHOLDS] for each in variants],
            _ott,
            interruptible=False,
        )
    ]


def _ott(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    import jax

    # The annealing starts at a temperature of twice the mean cost, known to a power of 2 so as to compile rarely.
    mean_cost = float(half_squared_distance(x, y).mean())
    start = 2.0 ** round(math.log2(2 * mean_cost / blur**2))
    static = {name: value for name, value in setting.items() if name != "threshold"}
    # About 10 s: a compiled loop cannot be interrupted, and it takes a power of the kernel at each iteration.
    entries = x.numel() // x.shape[-1] * y.shape[-2]
    limit = max(1_000, 6_000_000_000 // entries) if setting["lse_mode"] else max(100, 400_000_000 // entries)
    limit = min(limit, 20_000)
    function = _ott_compiled(batched=x.ndim == 3, start=start, max_iterations=limit, **static)
    points = [jax.dlpack.from_dlpack(cloud.contiguous()) for cloud in (x, y)]

    def call() -> tuple[Any, Any, Any]:
        value, gradients = jax.block_until_ready(function(*points, blur**2, setting["threshold"]))
        return value, *gradients

    return call


@functools.cache
def _ott_compiled(
    batched: bool, start: float, acceleration: str, decay: float | None, **solver: Any
) -> Callable[..., tuple[Any, tuple[Any, Any]]]:
    """Value and gradients (Danskin's theorem, its default) of a composition of its solver.

    That is its ``sinkhorn_divergence`` without the annealing of the self terms, which only slows them, and with the
    cost matrix computed once.
    """
    import jax
    from ott.geometry import epsilon_scheduler, geometry, pointcloud
    from ott.solvers import linear
    from ott.solvers.linear.acceleration import AndersonAcceleration, Momentum

    accelerations = {
        "plain": {},
        "momentum": {"momentum": Momentum(start=0, value=1.5)},
        "adaptive": {"momentum": Momentum(start=30)},
        "anderson": {"anderson": AndersonAcceleration(memory=5)},
    }
    symmetric = {"parallel_dual_updates": True, "momentum": Momentum(start=0, value=0.5)}

    def transport(x, y, eps, **options):
        cost = pointcloud.PointCloud(x, y, epsilon=1.0).cost_matrix / 2
        return linear.solve(geometry.Geometry(cost, epsilon=eps), **solver, **options).reg_ot_cost

    def divergence(x, y, eps, threshold):
        schedule = epsilon_scheduler.Epsilon(eps, init=start, decay=decay) if decay else eps
        cross = transport(x, y, schedule, threshold=threshold, **accelerations[acceleration])
        self_x, self_y = (transport(points, points, eps, threshold=threshold, **symmetric) for points in (x, y))
        return cross - 0.5 * (self_x + self_y)

    function = jax.value_and_grad(divergence, argnums=(0, 1))
    return jax.jit(jax.vmap(function, in_axes=(0, 0, None, None)) if batched else function)


def _flash_sides() -> list[Side]:
    annealed = [{"scaling": scaling} for scaling in GEOMLOSS_SCALINGS]
    constant = [
        [{"backend": backend, "threshold": threshold} for threshold in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)]
        for backend in ("symmetric", "alternating")
    ]
    return [Side("flash-sinkhorn", [annealed, *constant], _flash)]


def _flash(setting: Setting, x: Tensor, y: Tensor, blur: float) -> Call:
    """In full float32: with TF32, its default, it solves a problem of rounded points."""
    from flash_sinkhorn import SamplesLoss

    options = {"blur": blur, "half_cost": True, "debias": True, "allow_tf32": False, **setting}
    if "threshold" in setting:
        options |= {"use_epsilon_scaling": False, "eps": blur**2, "n_iters": 10_000, "inner_iterations": 5}
    return _through_autograd(SamplesLoss("sinkhorn", **options), x, y)

"""From the arguments of the Sinkhorn functions to a value with its gradient: read, solve, differentiate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.precision import exact_products
from lightning_wdefense.transport.entropic import triton
from lightning_wdefense.transport.entropic.geomloss_solver import geomloss_transports
from lightning_wdefense.transport.entropic.gpu.graphs import attempt_again
from lightning_wdefense.transport.entropic.gradients.envelope import differentiable_value
from lightning_wdefense.transport.entropic.newton import problem as newton
from lightning_wdefense.transport.entropic.problem.arguments import Arguments, Given, Pair, read_arguments
from lightning_wdefense.transport.entropic.problem.problem import shared
from lightning_wdefense.transport.entropic.problem.workspace import workspace
from lightning_wdefense.transport.entropic.solver import optimum as sinkhorn
from lightning_wdefense.transport.entropic.solver.optimum import Optimum
from lightning_wdefense.transport.entropic.warm_start import WarmStart


class SinkhornConvergenceWarning(UserWarning):
    """The iterations ended before the plan had the right marginals, so the value and the gradient are inexact."""


class Evaluation(NamedTuple):
    """What was read, the value ``(B,)`` with its gradient, the transports by pair, and the blur ``(B,)``.

    ``judged`` is whether the errors are known to be below the tolerance already.
    """

    arguments: Arguments
    value: Tensor
    optima: Mapping[Pair, Optimum]
    blur: Tensor
    judged: bool = False


def evaluate(given: Given, warm_start: WarmStart | None = None) -> Evaluation:
    """The value of the first transport, less half of those of the measures to themselves; warns if one did not converge."""
    with torch.autocast(given.x.device.type if isinstance(given.x, Tensor) else "cpu", enabled=False):
        if given.options.solver == "geomloss":
            arguments = read_arguments(given)
            value, (optima, blur) = geomloss_transports(arguments)
            return Evaluation(arguments, value, optima, blur)
        evaluation = _speculate(given, warm_start)
        if evaluation is None:
            evaluation = _solve(read_arguments(given), warm_start)
        _warn_unless_converged(evaluation)
        return evaluation


@torch.compiler.disable
def _speculate(given: Given, warm_start: WarmStart | None) -> Evaluation | None:
    """The evaluation on a GPU without waiting for it, or ``None`` if that is not possible or turns out not to be good enough."""
    if not isinstance(given.x, Tensor) or not triton.available(given.x.device) or callable(given.options.cost):
        return None
    claims: list[Tensor] = []
    arguments = read_arguments(given, claims)
    if shared(arguments):
        return None
    start = None if warm_start is None else warm_start.recall(arguments.y.weights)
    with torch.no_grad(), exact_products():
        attempt = attempt_again(arguments, start)
    if attempt is None:
        return None
    value = differentiable_value(arguments, attempt.transports)
    n_iter = attempt.passed(claims)
    if n_iter is None:
        return None
    optima, blur = attempt.transports
    optima = {**optima, "xy": optima["xy"]._replace(n_iter=n_iter)}
    if warm_start is not None:
        warm_start.potential = optima["xy"].g
    return Evaluation(arguments, value, optima, blur, judged=True)


@torch.compiler.disable
def _solve(arguments: Arguments, warm_start: WarmStart | None) -> Evaluation:
    """The evaluation step by step: by Newton's method for few small problems on a CPU, else by Sinkhorn's iteration."""
    (size, n), m = arguments.x.weights.shape, arguments.y.weights.shape[1]
    small = newton.suits(size, n, m, arguments.x.weights.device) and not shared(arguments)
    solve = newton.transports if small else sinkhorn.transports
    start = None if warm_start is None else warm_start.recall(arguments.y.weights)
    # A step of the iteration that is rejected later may overflow.
    with torch.no_grad(), exact_products(), numpy.errstate(all="ignore"), workspace() as work:
        transports = solve(arguments, start, work)
    optima, blur = transports
    if warm_start is not None:
        warm_start.potential = optima["xy"].g  # the next call checks how good it is
    return Evaluation(arguments, differentiable_value(arguments, transports), optima, blur)


def _warn_unless_converged(evaluation: Evaluation) -> None:
    """One warning for all the transports of a call.

    The error has one digit so that the same text comes back, which Python's default filter shows once.
    """
    if evaluation.judged:
        return
    options = evaluation.arguments.options
    errors = (optimum.error for optimum in evaluation.optima.values())
    error = max(float(each if each.numel() == 1 else each.max()) for each in errors)
    if not error <= options.tol:
        warnings.warn(
            f"Sinkhorn stopped after max_iter={options.max_iter} iterations at a marginal error of {error:.0e}, above "
            f"tol={options.tol:g}: value and gradient are inexact. Use a larger blur, a larger max_iter or tol, or "
            "float64 inputs if the blur is so small that float32 cannot resolve it.",
            SinkhornConvergenceWarning,
            stacklevel=4,
        )

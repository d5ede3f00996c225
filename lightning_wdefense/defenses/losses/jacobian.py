"""The slope of a model's outputs in its inputs, as a term of the loss: one more backward pass, which is itself differentiated."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense.attacks.norms import random_normal, rows
from lightning_wdefense.modules.autograd import gradients

Directions = Literal["transport", "random"]


class JacobianError(RuntimeError):
    """The Jacobian of the model, or its derivative, cannot be computed; the message says why and what to do."""


def slopes_along(features: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """``v_i^T J_i``, the gradient of each sample's features along a direction, in its values, with a graph.

    It assumes that a sample's features depend on its own values only (BatchNorm in training mode couples them a little, which is
    neglected, as usual).

    Args:
        features: ``(N, ...)``, with a graph to ``values``.
        values: ``(N, ...)``, the inputs, which need a gradient.
        directions: ``v``, ``(N, D)``, each of norm 1 or 0; constants.

    Returns:
        Slopes in the shape of ``values``, with a graph to the model's parameters.

    Raises:
        JacobianError: if the features do not depend differentiably on the values, or the model does not support double
            backward.

    Example:
        >>> values = torch.zeros(2, 3, requires_grad=True)
        >>> slopes_along(values @ torch.diag(torch.tensor([1.0, 2.0, 3.0])), values, torch.eye(3)[:2]).detach()
        tensor([[1., 0., 0.],
                [0., 2., 0.]])
    """
    try:
        (slope,) = gradients((rows(features) * directions.detach()).sum(), [values], create_graph=True)
    except RuntimeError as error:
        raise JacobianError(_unsupported(error)) from error
    if slope is None:
        raise JacobianError(
            "The features do not depend differentiably on the inputs, so jacobian_weight= has no Jacobian to make small: look for a "
            "detach(), a no_grad() block or an argmax in forward, or set jacobian_weight=0."
        )
    return slope


def squared_slope(slopes: Tensor, features: Tensor) -> Tensor:
    """``D * mean_i |v_i^T J_i|^2`` for ``D`` features a sample.

    For directions that are uniform on the sphere its expectation is the mean squared Frobenius norm of the Jacobian.

    Args:
        slopes: the slopes along a direction for each sample, ``(N, ...)``.
        features: the features, ``(N, ...)``.

    Returns:
        A scalar.

    References:
        Hoffman, Roberts, Yaida, "Robust learning with Jacobian regularization", 2019.

    Example:
        >>> squared_slope(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.zeros(2, 3))  # 3 (1 + 4) / 2
        tensor(7.5000)
    """
    return slopes.square().sum() * (features[0].numel() / len(features))


def check_double_backward(slope: Tensor, parameters: list[Tensor]) -> None:
    """Differentiate the slope once, for a clear error in place of one from inside of the training's backward pass.

    Args:
        slope: the term, a scalar with a graph.
        parameters: the parameters that are trained.

    Raises:
        JacobianError: if the model does not support double backward.
    """
    if not slope.requires_grad:  # linear in the inputs, with frozen weights
        return
    # Gradients in given tensors leave out the nodes that raise in a whole backward pass, because these lead nowhere.
    missing = _operations(slope) & {"NotImplemented", "DelayedError", "Error"}
    if missing:
        raise JacobianError(_unsupported("the derivative of one of its gradients is not implemented."))
    try:
        gradients(slope, parameters, retain_graph=True)
    except RuntimeError as error:
        raise JacobianError(_unsupported(error)) from error


def transport_directions(discrepancy: Tensor, features: Tensor) -> Tensor:
    """The direction in which transport moves the features of each sample, ``(N, D)`` of norm 1; 0 for a sample that stays.

    It is the gradient of the discrepancy in the adversarial features. For the sliced Wasserstein distance this is the displacement to the
    matched clean sample along each projection, averaged over the projections.

    Args:
        discrepancy: the discrepancy, a scalar with a graph to ``features``.
        features: adversarial features ``(N, ...)``.
    """
    # Without a graph the discrepancy is NaN, because training diverged: another error says so.
    moves = gradients(discrepancy, [features], retain_graph=True)[0] if discrepancy.requires_grad else None
    if moves is None:
        return torch.zeros_like(rows(features.detach()))
    return _normalised(rows(moves))


def random_directions(features: Tensor, generator: torch.Generator) -> Tensor:
    """Directions that are uniform on the sphere, ``(N, D)``."""
    return _normalised(random_normal(rows(features.detach()), generator))


def _normalised(vectors: Tensor) -> Tensor:
    largest = vectors.abs().amax(1, keepdim=True)  # squares of tiny gradients would underflow
    return F.normalize(vectors / largest.where(largest > 0, 1), dim=1)


def _operations(value: Tensor) -> set[str]:
    """The names of all operations in the graph of a tensor."""
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [each for each, _ in node.next_functions]
    return {node.name().split("::")[-1] for node in seen}


def _unsupported(error: object) -> str:
    return (
        f"jacobian_weight= differentiates a gradient (double backward), which this model does not support: {error} Replace the operation "
        "(cuDNN's recurrent layers, fused attention and functions of your own with once_differentiable are known cases; for attention "
        "use torch.nn.attention.sdpa_kernel(SDPBackend.MATH)), or set jacobian_weight=0."
    )

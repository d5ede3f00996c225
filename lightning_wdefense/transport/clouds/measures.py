"""Weighted point clouds, read from the arguments of the caller and checked once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.padding import contained

MASS_TOLERANCE = 1e-3
"""Relative difference between the two total masses that counts as rounding, for every dtype; see :func:`_rounding`."""


class Measure(NamedTuple):
    """A batch of weighted clouds: points ``(B, N, D)``, weights ``(B, N)``, labels ``(B, N)``, ``(B, N, K)`` or none."""

    points: Tensor
    weights: Tensor
    labels: Tensor | None

    def detached(self) -> Measure:
        """The same without a graph."""
        return Measure(self.points.detach(), self.weights.detach(), self.labels)

    def mean(self) -> Tensor:
        """Centre of mass ``(..., 1, D)``."""
        shares = self.weights / self.weights.sum(-1, keepdim=True)
        return (shares.unsqueeze(-1) * self.points).sum(-2, keepdim=True)

    def rows(self, part: slice) -> Measure:
        """The measure of a slice of the points of one problem."""
        return Measure(self.points[part], self.weights[part], None if self.labels is None else self.labels[part])

    def problem(self, i: int) -> Measure:
        """The measure of one problem of the batch: points ``(N, D)``, weights ``(N,)`` and labels alike."""
        return Measure(self.points[i], self.weights[i], None if self.labels is None else self.labels[i])


def read_measures(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    *,
    balanced: bool,
    own_cost: bool = False,
    claims: list[Tensor] | None = None,
) -> tuple[Measure, Measure]:
    """Both clouds as batched measures in float32 or float64, or an error that names the argument and what is wrong with it.

    Points of weight zero may have any value and any label, and are returned as :func:`~lightning_wdefense.transport.clouds.padding.contained` describes. In the balanced case
    the second mass is scaled to the first, so that rounding cannot make the problem infeasible.

    With ``claims`` no value is read, because the host would have to wait for a GPU. The conditions on values are appended to that list
    as booleans ``()``. If one of them is false, the measures are invalid, and a call without ``claims`` raises the error.
    """
    _check_cloud("x", x)
    _check_cloud("y", y)
    _check_pair(x, y)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    weights_x = _read_weights("a", a, "x", x, dtype, claims)
    weights_y = _read_weights("b", b, "y", y, dtype, claims)
    if claims is None:
        check_finite("x", x, weights_x)
        check_finite("y", y, weights_y)
    points_x, points_y = usable(x.to(dtype)), usable(y.to(dtype))
    x_labels = _read_labels("x_labels", x_labels, "x", x, weights_x, claims)
    y_labels = _read_labels("y_labels", y_labels, "y", y, weights_y, claims)
    if x_labels is not None and y_labels is not None:
        _check_label_pair(x_labels, y_labels)
    if a is not None or b is not None:
        points_x, points_y = contained(
            points_x, points_y, weights_x, weights_y, own_cost=own_cost, padded=None if claims is None else True
        )
    if claims is not None:  # Of what is contained now, as padding may be NaN.
        claims.append((points_x.detach().sum() + points_y.detach().sum()).abs() < torch.inf)
    # Of as many points without weights the masses are the same to the last bit.
    if balanced and (a is not None or b is not None or x.shape[-2] != y.shape[-2]):
        mass_x, mass_y = equal_masses(
            *(weights_x, weights_y, a, b),
            "normalise them, or pass reach= to let mass be created and destroyed",
            claims,
        )
        weights_y = weights_y * (mass_x / mass_y)

    def batch(tensor: Tensor) -> Tensor:
        return tensor if x.ndim == 3 else tensor[None]

    def labels(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return batch(tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)

    return (
        Measure(batch(points_x), batch(weights_x), labels(x_labels)),
        Measure(batch(points_y), batch(weights_y), labels(y_labels)),
    )


def equal_masses(
    weights_x: Tensor,
    weights_y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    remedy: str,
    claims: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The masses ``(..., 1)`` of weights ``(..., N)`` and ``(..., M)``, or an error if they differ by more than rounding.

    Args:
        weights_x: in float32 or better.
        weights_y: likewise.
        a: the first weights as the caller gave them, whose dtype says how far they may be rounded; ``None`` if he gave none.
        b: the second ones.
        remedy: what the caller should do.
        claims: as for :func:`read_measures`.
    """
    mass_x, mass_y = weights_x.sum(-1, keepdim=True), weights_y.sum(-1, keepdim=True)
    apart, rounding = (mass_x - mass_y).abs(), _rounding(a, mass_x) + _rounding(b, mass_y)
    wrong = apart > torch.maximum(MASS_TOLERANCE * mass_x, rounding)
    if not _holds(~wrong.any(), claims):
        share = float((apart / mass_x)[wrong].max())
        raise ValueError(
            f"a and b must have equal sums, got {_show(mass_x)} and {_show(mass_y)} (weights not given sum to 1), {share:.2g} of "
            f"the mass apart where rounding explains {float((rounding / mass_x)[wrong].max().clamp(min=MASS_TOLERANCE)):.2g}: {remedy}."
        )
    return mass_x, mass_y


def _rounding(given: Tensor | None, mass: Tensor) -> Tensor:
    """How far the sum of weights is off by the rounding of each to the dtype in which the caller gave them, ``(..., 1)``.

    At most half a unit in the last place for each weight, and as much for the sum by which he divided; the smallest numbers,
    into which many weights in float16 fall, have larger units.
    """
    if given is None:
        return torch.zeros_like(mass)
    dtype = torch.finfo(given.dtype)
    return dtype.eps * (mass + given.shape[-1] * dtype.smallest_normal)


def usable(tensor: Tensor) -> Tensor:
    """Autograd cannot save an inference tensor, but a copy made outside inference mode is an ordinary one."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _check_cloud(name: str, points: Tensor) -> None:
    check_float(name, points)
    if points.ndim not in (2, 3):
        hint = f" Flatten each sample first: {name}.flatten(1)." if points.ndim > 3 else ""
        raise ValueError(f"{name} must have shape (N, D) or (B, N, D), got {tuple(points.shape)}.{hint}")
    if 0 in points.shape:
        raise ValueError(f"{name} is empty: its shape is {tuple(points.shape)}, and each size must be at least 1.")


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must agree in all but the number of points, (N, D) and (M, D) or (B, N, D) and (B, M, D); "
            f"got x {tuple(x.shape)} and y {tuple(y.shape)}."
        )
    check_device("y", y, x)


def _read_weights(
    name: str, weights: Tensor | None, of: str, points: Tensor, dtype: torch.dtype, claims: list[Tensor] | None
) -> Tensor:
    if weights is None:
        return torch.full(points.shape[:-1], 1 / points.shape[-2], dtype=dtype, device=points.device)
    check_float(name, weights)
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"{name} must hold one weight for each point of {of}, shape {tuple(points.shape[:-1])}; "
            f"got {tuple(weights.shape)}."
        )
    check_device(name, weights, points)
    if claims is None:
        check_finite(name, weights)
    # Infinite ones have no finite sum, and NaN is not positive.
    if not _holds((weights >= 0).all(), claims):
        raise ValueError(f"{name} must not be negative, its smallest value is {float(weights.min()):.3g}.")
    weights = usable(weights.to(dtype))
    mass = weights.detach().sum(-1)
    if not _holds((mass > 0).all() if claims is None else ((mass > 0) & mass.isfinite()).all(), claims):
        raise ValueError(f"{name} sums to zero: there is nothing to transport.")
    return weights


def _read_labels(
    name: str, labels: Tensor | None, of: str, points: Tensor, weights: Tensor, claims: list[Tensor] | None
) -> Tensor | None:
    """Labels, legal at points of weight zero too."""
    if labels is None:
        return None
    _check_tensor(name, labels)
    check_device(name, labels, points)
    expected = tuple(points.shape[:-1])
    soft = labels.is_floating_point()
    if tuple(labels.shape[:-1] if soft else labels.shape) != expected:
        shape = f"({', '.join(map(str, expected))}, K) if floating point" if soft else f"{expected} if integer"
        raise ValueError(
            f"{name} must hold one label for each point of {of}, shape {shape}; got {tuple(labels.shape)}."
        )
    if not soft:
        return labels
    # Written so that NaN counts as wrong.
    wrong = ~((labels >= 0).all(-1) & ((labels.sum(-1) - 1).abs() <= 0.02))
    if not _holds(~(wrong & (weights > 0)).any(), claims):
        raise ValueError(f"{name} of a floating dtype must be probabilities (at least 0, rows summing to 1).")
    return torch.where(wrong.unsqueeze(-1), 1 / labels.shape[-1], labels)


def _check_label_pair(x_labels: Tensor, y_labels: Tensor) -> None:
    soft = x_labels.is_floating_point()
    if soft != y_labels.is_floating_point() or (soft and x_labels.shape[-1] != y_labels.shape[-1]):
        raise ValueError(
            f"x_labels and y_labels must both be integer, or both probabilities over the same classes; got "
            f"{x_labels.dtype} {tuple(x_labels.shape)} and {y_labels.dtype} {tuple(y_labels.shape)}."
        )


def _holds(condition: Tensor, claims: list[Tensor] | None) -> bool:
    """Whether it holds; with ``claims`` that is seen later, and taken for granted here."""
    if claims is None:
        return bool(condition)
    claims.append(condition.detach())
    return True


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")


def check_float(name: str, tensor: Tensor) -> None:
    """An error unless it is a tensor of a floating dtype."""
    _check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}: pass {name}.float().")


def check_finite(name: str, tensor: Tensor, weights: Tensor | None = None) -> None:
    """An error if it holds NaN or infinity, except in points ``(..., N, D)`` of weight zero."""
    # A sum is finite only if all its terms are, and takes a fiftieth of the time to look at; but it may overflow.
    if math.isfinite(tensor.detach().sum()):
        return
    finite = tensor.isfinite()
    if not bool((finite if weights is None else finite.all(-1) | (weights == 0)).all()):
        raise ValueError(f"{name} {tuple(tensor.shape)} holds NaN or infinite values.")


def check_device(name: str, tensor: Tensor, points: Tensor) -> None:
    """An error unless it is where ``x`` is."""
    if tensor.device != points.device:
        raise ValueError(f"{name} is on {tensor.device}, x is on {points.device}: move them to one device.")


def _show(mass: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in mass.flatten()[:4].tolist())

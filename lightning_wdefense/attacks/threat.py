"""The threat model: the norm, the perturbation budget and the legal range of the inputs, in data units."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.norms import BALLS, Ball, l1_project
from lightning_wdefense.modules.outputs import float32_or_better

PACKAGE = __name__.split(".")[0]
Norm = Literal["linf", "l2", "l1", "wasserstein"]

MAX_STRAYS = 0.01
"""Largest share of input values that may lie outside the bounds, as after augmentation; a larger share is an error."""


class Box(NamedTuple):
    """Element-wise limits of the adversarial inputs, in data units; ``None`` where there is no limit."""

    low: Tensor | None
    high: Tensor | None

    def clamp(self, data: Tensor) -> Tensor:
        """Clamp ``data`` into the box."""
        return data if self.low is None else torch.clamp(data, self.low, self.high)

    def clamp_(self, data: Tensor) -> Tensor:
        """Clamp ``data`` into the box, in place."""
        return data if self.low is None else data.clamp_(self.low, self.high)

    def around(self, center: Tensor, radius: float) -> Box:
        """The part of the box within ``radius`` (data units) of ``center`` in every coordinate; ``center`` lies in the box."""
        low, high = center - radius, center + radius
        if self.low is None or self.high is None:
            return Box(low, high)
        return Box(torch.maximum(low, self.low, out=low), torch.minimum(high, self.high, out=high))

    def select(self, index: Tensor) -> Box:
        """The limits of some samples, by a boolean mask or indices."""
        return self if self.low is None or self.high is None else Box(self.low[index], self.high[index])


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do to an input: the norm, the perturbation budget and the legal range of values.

    ``eps`` and ``bounds`` are in *data units*: the units of the data before normalisation (images: usually 0 to 1). The
    inputs that the pipeline gives to the model are in *model units*: ``model = (data - mean) / std`` along dimension 1.
    With ``mean`` and ``std`` an attack is the same in data units, whatever units the model sees.

    Args:
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or ``"wasserstein"`` (for :class:`WassersteinAttack` alone).
        eps: the perturbation budget, the radius of the ball, in data units; in pixels for ``"wasserstein"``.
        bounds: smallest and largest legal value, in data units; ``None`` for unbounded inputs (tabular data).
        mean: the mean that the pipeline subtracts, in data units: one value, or one per channel (dimension 1); ``None``
            for 0.
        std: the standard deviation that the pipeline divides by, in the same form; ``None`` for 1.

    Raises:
        ValueError: if the norm is unknown, ``eps`` is negative or not finite, ``bounds`` are not finite and increasing,
            or ``std`` is not positive.

    Warns:
        UserWarning: if ``eps`` is larger than the whole range of the bounds (norm ``linf``).

    Example:
        >>> threat = ThreatModel(norm="linf", eps=8 / 255, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
        >>> threat.with_eps(4 / 255).eps == 4 / 255
        True
    """

    norm: Norm = "linf"
    eps: float = 8 / 255
    bounds: tuple[float, float] | None = (0.0, 1.0)
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(unknown_name("norm", self.norm, get_args(Norm)))
        object.__setattr__(self, "eps", float(self.eps))
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps must be finite and not negative (data units), got {self.eps}.")
        if self.bounds is not None:
            if len(self.bounds) != 2 or not -math.inf < self.bounds[0] < self.bounds[1] < math.inf:
                raise ValueError(f"bounds must be (low, high) with low < high, or None, got {self.bounds!r}.")
            object.__setattr__(self, "bounds", tuple(map(float, self.bounds)))
            self._warn_of_units(*self.bounds)
        for name in ("mean", "std"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        if self.std is not None and not all(value > 0 for value in self.std):  # type: ignore[union-attr]
            raise ValueError(f"std must be positive, got {self.std!r}.")

    def _warn_of_units(self, low: float, high: float) -> None:
        if self.norm == "linf" and self.eps > high - low:
            warnings.warn(
                f"eps={self.eps:g} is larger than the whole range of the bounds, {(low, high)}, so every input is allowed. Both are in "
                f"data units: for pixels from 0 to 1 write a budget of 8 grey levels as eps=8 / 255; for pixels from 0 to 255 set "
                f"bounds=(0, 255).",
                stacklevel=4,
            )

    @property
    def ball(self) -> Ball:
        """Sampling, steepest ascent and projection for this norm.

        Raises:
            ValueError: for the norm ``"wasserstein"``, which only :class:`WassersteinAttack` attacks in.
        """
        if self.norm not in BALLS:
            raise ValueError(
                f"norm {self.norm!r} has no ball in pixel space. FGSM, PGD and AutoAttack need norm {' or '.join(BALLS)}: change the "
                'norm, or use WassersteinAttack, whose name in attacks= and attack= is "wasserstein".'
            )
        return BALLS[self.norm]

    def with_eps(self, eps: float) -> ThreatModel:
        """The same threat model with another perturbation budget ``eps`` (data units)."""
        return replace(self, eps=eps)

    def ratio_to(self, eps: float) -> float:
        """The factor ``eps / self.eps`` for lengths that were chosen for this budget; 1 if either is 0."""
        return eps / self.eps if self.eps > 0 and eps > 0 else 1.0

    def to_data(self, inputs: Tensor) -> Tensor:
        """Model units to data units: ``inputs * std + mean``."""
        mean, std = self._statistics(inputs)
        data = inputs if std is None else inputs * std
        return data if mean is None else data + mean

    def to_model(self, data: Tensor) -> Tensor:
        """Data units to model units: ``(data - mean) / std``."""
        mean, std = self._statistics(data)
        inputs = data if mean is None else data - mean
        return inputs if std is None else inputs / std

    def project(self, data: Tensor, clean: Tensor, box: Box) -> Tensor:
        """Project ``data`` into the ball around ``clean`` and into the box, which contains ``clean``; all in data units.

        For L-infinity and L1 it is the nearest point of both. For L2 the box follows on the ball.
        """
        return self.project_(data.clone(), clean, box)

    def project_(self, data: Tensor, clean: Tensor, box: Box, radius: Tensor | None = None) -> Tensor:
        """:meth:`project`, which may work in the memory of ``data``; with a ``radius`` ``(N,)`` of each sample in place of eps."""
        delta, eps = data.sub_(clean), self.eps if radius is None else radius
        if self.norm == "l1" and box.low is not None and box.high is not None:
            delta = l1_project(delta, eps, box.low - clean, box.high - clean)
        else:
            delta = self.ball.project(delta, eps)
        return box.clamp_(delta.add_(clean))

    def read(self, inputs: Tensor) -> tuple[Tensor, Box]:
        """Inputs in model units, converted to data units (float32 or float64), and their limits; checked by :meth:`box`."""
        # Integers are not converted: box refuses them.
        data = self.to_data(float32_or_better(inputs)) if inputs.is_floating_point() else inputs
        return data, self.box(data, precision=inputs.dtype)

    def box(self, data: Tensor, precision: torch.dtype | None = None) -> Box:
        """Element-wise limits for clean inputs, after a check of the inputs against the bounds.

        If a few values (at most 1%) lie outside the bounds, the limits are widened for these values, so that the clean
        input stays legal.

        Args:
            data: clean inputs in data units, of any shape.
            precision: the dtype of the pipeline's inputs, whose rounding errors are tolerated; ``None`` for that of
                ``data``.

        Returns:
            The limits, in data units, in the shape of ``data``.

        Raises:
            TypeError: if the inputs are not floating point.
            ValueError: if they are not finite, or more than 1% of the values lie outside the bounds.
        """
        if not data.is_floating_point():
            raise TypeError(
                f"The inputs are {data.dtype}; an attack needs floating-point inputs. Convert integer images with "
                "x.float() / 255, and give ThreatModel the mean= and std= of the normalisation. For token ids and categorical columns, "
                'attack the output of their embedding layer: perturb="path.to.the.embedding" in the callbacks.'
            )
        least, most = torch.stack(torch.aminmax(data)).tolist() if data.numel() else (0.0, 0.0)
        if self.bounds is None:
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ValueError("The inputs contain NaN or infinite values: check the data pipeline.")
            return Box(None, None)
        low, high = self.bounds
        rounding = 8 * torch.finfo(precision or data.dtype).eps * max(1.0, abs(low), abs(high), high - low)
        # NaN compares false, so it counts as outside.
        if data.numel() and not (least >= low - rounding and most <= high + rounding):
            outside = float((~((data >= low - rounding) & (data <= high + rounding))).float().mean())
            self._explain(data, outside)
        return Box(data.clamp(max=low), data.clamp(min=high))

    def _explain(self, data: Tensor, outside: float) -> None:
        if not bool(torch.isfinite(data).all()):
            raise ValueError("The inputs contain NaN or infinite values: check the data pipeline.")
        if outside <= MAX_STRAYS:
            warnings.warn(
                f"A few input values lie outside the threat model's bounds {self.bounds}, perhaps because of augmentation. The "
                "bounds are widened for these values only.",
                stacklevel=_callers_level(),
            )
            return
        units = (
            "mean and std are not set; if the pipeline normalises its inputs, give the same values to "
            "ThreatModel(mean=..., std=...)"
            if self.mean is None and self.std is None
            else f"mean={self.mean} and std={self.std} are not those of the pipeline's normalisation"
        )
        raise ValueError(
            f"{outside:.1%} of the input values lie outside the threat model's bounds {self.bounds}: in data units they "
            f"run from {float(data.min()):.4g} to {float(data.max()):.4g}. Likely cause: {units}. If the data has another "
            "range, set bounds=(low, high); for unbounded inputs set bounds=None."
        )

    def _statistics(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._statistic("mean", inputs), self._statistic("std", inputs)

    def _statistic(self, name: str, inputs: Tensor) -> Tensor | None:
        values: tuple[float, ...] | None = getattr(self, name)
        if values is None:
            return None
        if len(values) != 1 and (inputs.ndim < 2 or inputs.shape[1] != len(values)):
            raise ValueError(
                f"{name} has {len(values)} values, but the inputs have shape {tuple(inputs.shape)}, and their dimension 1 "
                f"does not have {len(values)} entries: give one value, or one per channel."
            )
        return _broadcastable(values, inputs.device, inputs.dtype, inputs.ndim)


def _callers_level() -> int:
    """The ``stacklevel`` at which a warning points at the code that called this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (PACKAGE, "contextlib"):
        level, frame = level + 1, frame.f_back
    return level - 1


def check_threat(threat: object, user: str) -> None:
    """Refuse anything that is not a :class:`ThreatModel`, such as a number.

    Args:
        threat: the value to check.
        user: what needs the threat model, for the error message.

    Raises:
        TypeError: if it is not a threat model; the message says what to write.
    """
    if not isinstance(threat, ThreatModel):
        radius = isinstance(threat, (int, float)) and not isinstance(threat, bool)
        written = f"ThreatModel(eps={threat})" if radius else "ThreatModel(eps=8 / 255)"
        hint = " For Hydra add _target_: lightning_wdefense.ThreatModel to it." if isinstance(threat, Mapping) else ""
        raise TypeError(
            f"{user} needs a threat model, such as {written}, for threat=, but got a {type(threat).__name__}: {threat!r}.{hint}"
        )


def _as_tuple(values: float | Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the result is cached: an inference tensor would break later backward passes
def _broadcastable(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, ndim: int) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).reshape([1, -1, *[1] * (ndim - 2)] if ndim > 1 else [-1])

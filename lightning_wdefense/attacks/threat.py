"""What the attacker may do, said once and in data units."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.norms import BALLS, Ball
from lightning_wdefense.modules.outputs import float32_or_better

Norm = Literal["linf", "l2", "wasserstein"]

MAX_STRAYS = 0.01
"""Share of input values that may lie outside the bounds (augmentation overshoots); more is an error."""


class Box(NamedTuple):
    """Element-wise limits of the adversarial inputs, in data units; ``None`` where there is no limit."""

    low: Tensor | None
    high: Tensor | None

    def clamp(self, data: Tensor) -> Tensor:
        """Clamp ``data`` into the box."""
        return data if self.low is None else torch.clamp(data, self.low, self.high)

    def clamp_(self, data: Tensor) -> Tensor:
        """Clamp ``data`` into the box, in its own memory."""
        return data if self.low is None else data.clamp_(self.low, self.high)

    def around(self, center: Tensor, radius: float) -> Box:
        """The part of the box that is within ``radius`` of ``center``, which it holds, in every coordinate."""
        low, high = center - radius, center + radius
        if self.low is None or self.high is None:
            return Box(low, high)
        return Box(torch.maximum(low, self.low, out=low), torch.minimum(high, self.high, out=high))

    def select(self, index: Tensor) -> Box:
        """The limits of some of the samples."""
        return self if self.low is None or self.high is None else Box(self.low[index], self.high[index])


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do to an input: the norm, its radius and the legal range of values.

    ``eps`` and ``bounds`` are in *data* units, those of the data before normalisation (images: usually 0 to 1);
    ``mean`` and ``std`` say how the pipeline normalised its inputs, ``model = (data - mean) / std`` along dimension 1,
    so that attacks are the same whatever units the model sees.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"wasserstein"`` (the last for attacks that move mass only).
        eps: radius of the ball, in data units.
        bounds: smallest and largest legal value, in data units; ``None`` for unbounded inputs (tabular data).
        mean: the mean that the pipeline subtracted: one value, or one for each channel (dimension 1); ``None`` for 0.
        std: the standard deviation that it divided by, likewise; ``None`` for 1.

    Raises:
        ValueError: if the norm does not exist, ``eps`` is negative or not finite, ``bounds`` are not increasing, or
            ``std`` is not positive.

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
                f"eps={self.eps:g} is larger than the whole range of the bounds, {(low, high)}: every input is allowed. Both are in data "
                f"units; where pixels run from 0 to 255, 8 of them are eps=8 / 255, or bounds=(0, 255).",
                stacklevel=4,
            )

    @property
    def ball(self) -> Ball:
        """Sampling, steepest ascent and projection for this norm."""
        if self.norm not in BALLS:
            raise ValueError(
                f"norm {self.norm!r} has no ball in pixel space, which FGSM, PGD and AutoAttack need ({' or '.join(BALLS)}): use "
                'WassersteinAttack, in attacks= or attack= by its name "wasserstein".'
            )
        return BALLS[self.norm]

    def with_eps(self, eps: float) -> ThreatModel:
        """The same threat with another radius."""
        return replace(self, eps=eps)

    def ratio_to(self, eps: float) -> float:
        """By how much lengths that were chosen for this radius change with it; 1 from and to 0, which have no proportion."""
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
        """Nearest legal point: into the ball around ``clean``, then into the box (which holds ``clean``)."""
        return box.clamp(clean + self.ball.project(data - clean, self.eps))

    def read(self, inputs: Tensor) -> tuple[Tensor, Box]:
        """Inputs in model units as data in float32 or better, and their limits, after :meth:`box`'s checks."""
        # Integers go on as they are, for box to refuse.
        data = self.to_data(float32_or_better(inputs)) if inputs.is_floating_point() else inputs
        return data, self.box(data, precision=inputs.dtype)

    def box(self, data: Tensor, precision: torch.dtype | None = None) -> Box:
        """Element-wise limits for these clean inputs (data units), after checking them against the bounds.

        A few values outside (at most 1%) widen the box for themselves, so that the clean input stays legal.

        Args:
            data: clean inputs in data units.
            precision: the dtype in which the inputs came; its rounding is forgiven.

        Raises:
            TypeError: if the inputs are not floating point.
            ValueError: if they are not finite, or more than 1% of the values lie outside the bounds.
        """
        if not data.is_floating_point():
            raise TypeError(
                f"The inputs are {data.dtype}; an attack needs floating-point inputs. Convert integer images with "
                "x.float() / 255 (and give ThreatModel the mean= and std= of any normalisation). Token ids and categorical columns are "
                'attacked where they are embedded: perturb="path.to.the.embedding" in the callbacks.'
            )
        least, most = torch.stack(torch.aminmax(data)).tolist() if data.numel() else (0.0, 0.0)
        if self.bounds is None:
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ValueError("The inputs hold NaN or infinite values: look at the data pipeline.")
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
            raise ValueError("The inputs hold NaN or infinite values: look at the data pipeline.")
        if outside <= MAX_STRAYS:
            warnings.warn(
                f"A few input values lie outside the threat model's bounds {self.bounds} (augmentation?); the bounds "
                "are widened for those values alone.",
                stacklevel=5,
            )
            return
        units = (
            "mean and std are not set: if the pipeline normalises its inputs, give ThreatModel(mean=..., std=...) the "
            "same values"
            if self.mean is None and self.std is None
            else f"mean={self.mean} and std={self.std} are not those of the pipeline's normalisation"
        )
        raise ValueError(
            f"{outside:.1%} of the input values lie outside the threat model's bounds {self.bounds}: in data units they "
            f"run from {float(data.min()):.4g} to {float(data.max()):.4g}. Likely cause: {units}. If the data has another "
            "range, set bounds=(low, high), or bounds=None for unbounded inputs."
        )

    def _statistics(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._statistic("mean", inputs), self._statistic("std", inputs)

    def _statistic(self, name: str, inputs: Tensor) -> Tensor | None:
        values: tuple[float, ...] | None = getattr(self, name)
        if values is None:
            return None
        if len(values) != 1 and (inputs.ndim < 2 or inputs.shape[1] != len(values)):
            raise ValueError(
                f"{name} has {len(values)} values, but dimension 1 of the inputs, whose shape is "
                f"{tuple(inputs.shape)}, does not: give one value, or one for each channel."
            )
        return _broadcastable(values, inputs.device, inputs.dtype, inputs.ndim)


def check_threat(threat: object, user: str) -> None:
    """Refuse what is no threat model, such as a radius.

    Raises:
        TypeError: saying what to write.
    """
    if not isinstance(threat, ThreatModel):
        radius = isinstance(threat, (int, float)) and not isinstance(threat, bool)
        written = f"ThreatModel(eps={threat})" if radius else "ThreatModel(eps=8 / 255)"
        raise TypeError(
            f"{user} needs a threat model, such as {written}, as its threat; got a {type(threat).__name__}: {threat!r}."
        )


def _as_tuple(values: float | Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached: an inference tensor would break every later backward
def _broadcastable(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, ndim: int) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).reshape([1, -1, *[1] * (ndim - 2)] if ndim > 1 else [-1])

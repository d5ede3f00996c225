"""The dual route to the Wasserstein distance: a Lipschitz critic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_wdefense._frozen import frozen
from lightning_wdefense._names import unknown_name
from lightning_wdefense.transport.clouds.precision import exact_products
from lightning_wdefense.transport.critic.lipschitz import PENALISED, CriticNetwork, Lipschitz, constrain

Average = Callable[[Tensor], Tensor]


class CriticObjective(NamedTuple):
    """What a critic's training step computes, all scalars.

    Attributes:
        loss: to minimise: the penalty less the gap.
        gap: mean score of ``x`` less mean score of ``y``, in units of the points.
        penalty: ``weight * mean (|gradient| - 1)^2``; 0 for a critic that needs none.
        gradient_norm: mean length of the critic's gradient between the clouds; NaN where the loss does not need it.
    """

    loss: Tensor
    gap: Tensor
    penalty: Tensor
    gradient_norm: Tensor


class WassersteinCritic(nn.Module):
    r"""A 1-Lipschitz function of points, whose gap between two clouds is at most their Wasserstein distance ``W_1``.

    ``W_1(x, y) = max_f mean f(x) - mean f(y)`` over all ``f`` of Lipschitz constant 1 (Kantorovich and Rubinstein). Trained for that
    (:class:`CriticTraining`, :func:`critic_distance`), the critic's gap estimates the distance from below.

    By default its layers are orthonormal matrices between :class:`GroupSort` activations (Anil et al., 2019), so that it is 1-Lipschitz at any
    time, and nothing needs to be weighed. The other ways: ``"spectral-norm"`` divides every matrix by its largest singular value
    (Miyato et al., 2018), by a bound that exceeds it by 1% at most; ``"gradient-penalty"`` adds ``penalty * mean (|f'| - 1)^2`` between the
    clouds to the loss (WGAN-GP, Gulrajani et al., 2017); ``"one-sided-penalty"`` only where ``|f'| > 1`` (Petzka et al., 2018). A penalty lets the gap overshoot, by about
    ``W_1^2 / (2 penalty)`` for scaled points; :meth:`distance` therefore divides it by the gradient's length, and :meth:`bounded_gap`, which a
    model can minimise, where that is more than 1.

    Points are centred and divided by the size of a typical coordinate, known from training; scores are in the units of the points. Everything
    is computed in the critic's own dtype, float32 unless you convert it to float64, with autocast off.

    Args:
        network: width ``D`` of the points, or their shape such as ``(1, 28, 28)``, for which a network is built (an MLP; for images a small
            convnet); or a module that takes ``(N, ...)`` and returns ``(N,)`` or ``(N, 1)``.
        lipschitz: how it is kept Lipschitz. Of a module the first two change linear layers and convolutions in place, and leave it to
            you that its activations are 1-Lipschitz; the penalties take any module.
        penalty: weight of a penalty.
        width: of the hidden layers that are built; ``None`` for the width of the points, from 64 to 256.
        depth: number of the hidden layers that are built.
        classes: number of classes, where the critic is to be one function a class: it then sees how far the clouds of *each class* are apart,
            and takes labels with the points. Only for a network that is built.
        seed: of the weights that are built. PyTorch's own random number generators are not touched.

    Raises:
        ValueError: if a setting is out of its range, or the module has a layer that does not go with ``lipschitz``, above all BatchNorm;
            in use, if points do not fit, are fewer than two, or not finite.

    References:
        Arjovsky, Chintala, Bottou, "Wasserstein GAN", ICML 2017.
        Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017.
        Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.
        Petzka, Fischer, Lukovnikov, "On the regularization of Wasserstein GANs", ICLR 2018.
        Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019.

    Example:
        >>> critic = WassersteinCritic(8)
        >>> points = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        >>> bool(critic.gap(points, points + 1) <= 8**0.5)
        True
    """

    centre: Tensor
    scale: Tensor
    batches: Tensor

    def __init__(
        self,
        network: int | Sequence[int] | nn.Module,
        *,
        lipschitz: Lipschitz = "orthogonal",
        penalty: float = 10.0,
        width: int | None = None,
        depth: int = 2,
        classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(lipschitz, penalty, width, depth, classes)
        self.lipschitz, self.penalty, self.classes = lipschitz, penalty, classes
        self.shape: tuple[int, ...] | None = None
        if isinstance(network, nn.Module):
            if classes is not None:
                raise ValueError(f"classes={classes} needs a network that is built, got a {type(network).__name__}.")
            self.network = network
        else:
            self.shape = (network,) if isinstance(network, int) else tuple(network)
            if not self.shape or min(self.shape) < 1:
                shape = ", ".join(map(str, self.shape))
                raise ValueError(f"The points must have at least one value, got shape (N, {shape}).")
            self.network = CriticNetwork(self.shape, width, depth, classes, seed).to(torch.get_default_device())
        self.orthonormal = constrain(self.network, lipschitz)
        # Not PyTorch's default dtype, which is one for all threads, and which Trainers change.
        dtype = next((each.dtype for each in self.network.parameters() if each.is_floating_point()), torch.float32)
        self.register_buffer("centre", torch.zeros(self.shape or (), dtype=dtype))
        self.register_buffer("scale", torch.ones((), dtype=dtype))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @property
    def penalised(self) -> bool:
        """Whether it is a penalty that keeps it Lipschitz, so that the gap may overshoot."""
        return self.lipschitz in PENALISED

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores ``(N,)`` of points ``(N, ...)``, in their units, in the critic's own dtype.

        Args:
            points: of the shape and device of the critic.
            labels: classes ``(N,)`` or their probabilities ``(N, K)``, for a critic with ``classes``, which needs them.
        """
        self._check(points)
        shares = () if self.classes is None else (self._shares(labels, len(points)),)
        with torch.autocast(points.device.type, enabled=False), exact_products():
            points = (points.to(self.scale.dtype) - self.centre) / self.scale
            try:
                scores = self.network(points, *shares)
            except RuntimeError as error:
                shape = ", ".join(map(str, points.shape[1:]))
                raise ValueError(f"The critic's network fails on points of shape (N, {shape}): {error}") from error
        if scores.shape not in ((len(points),), (len(points), 1)):
            raise ValueError(
                f"The critic must return a score for each of the {len(points)} points, ({len(points)},) or ({len(points)}, 1), "
                f"got {tuple(scores.shape)}."
            )
        return scores.reshape(len(points)) * self.scale

    def gap(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean score of ``x`` ``(N, ...)`` less that of ``y`` ``(M, ...)``, differentiable in both: what the critic says of the distance.

        ``labels``, for a critic with classes, are those of the samples in both clouds, which then are of the same number.
        """
        scores = self(torch.cat([x, y]), None if labels is None else torch.cat([labels, labels]))
        return scores[: len(x)].mean() - scores[len(x) :].mean()

    def distance(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate of ``W_1``: the gap, for a penalised critic divided by the length of its gradient between the clouds."""
        gap = self.gap(x, y, labels)
        return gap / self.gradient_norm(x, y, labels, generator=generator).mean() if self.penalised else gap

    def bounded_gap(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The gap for a model to minimise: divided by the length of a penalised critic's gradient where that is more than 1.

        The length is a constant for the gradient. A weak penalty lets the gap overshoot many times, and the points would be pulled as much too hard.
        """
        gap = self.gap(x, y, labels)
        # Not where it is less than 1: a critic that has not learned yet would be believed as much as one that has.
        return (
            gap / self.gradient_norm(x, y, labels, generator=generator).mean().clamp_min(1) if self.penalised else gap
        )

    def gradient_norm(
        self,
        x: Tensor,
        y: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
    ) -> Tensor:
        """Length of the critic's gradient at random places between ``x`` and ``y``: ``(max(N, M),)``."""
        size = max(len(x), len(y))
        x, y = x.detach().to(self.scale.dtype), y.detach().to(self.scale.dtype)
        device = x.device if generator is None else generator.device
        generator = generator or torch.Generator(device).manual_seed(int(self.batches))
        share = torch.rand((size, *[1] * (x.ndim - 1)), generator=generator, dtype=torch.float32, device=device).to(x)
        rows = torch.arange(size, device=x.device)
        # A backward pass under autocast is cast too, whatever the forward pass was.
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), exact_products():
            between = torch.lerp(x[rows % len(x)], y[rows % len(y)], share).requires_grad_()
            (gradient,) = torch.autograd.grad(self(between, labels).sum(), between, create_graph=create_graph)
        return gradient.flatten(1).norm(dim=1)

    def objective(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> CriticObjective:
        """What a training step minimises on ``x`` and ``y``, which are constants in it."""
        gap = self.gap(x.detach(), y.detach(), labels)
        if not self.penalised:
            return CriticObjective(-gap, gap, torch.zeros_like(gap), torch.full_like(gap, torch.nan))
        norm = self.gradient_norm(x, y, labels, generator=generator, create_graph=True)
        excess = norm - 1
        if self.lipschitz == "one-sided-penalty":
            excess = excess.clamp_min(0)
        penalty = self.penalty * excess.square().mean()
        # At the scale of the points, so that the balance of gap and penalty is that of normalised ones.
        return CriticObjective(penalty - gap / self.scale, gap, penalty, norm.mean())

    @torch.no_grad()
    def adapt(self, x: Tensor, y: Tensor, average: Average | None = None) -> None:
        """Take note of where the points lie and how large they are: a running mean, over all ranks if ``average`` is one over them."""
        self._check_batch(x, y)
        average = average or (lambda values: values)
        points = torch.cat([x, y]).to(self.scale.dtype).flatten(1)
        mean = average(points.mean(0))
        # Around the mean, for far from the origin the difference of two large squares is rounding.
        size = average((points - mean).square().mean()).sqrt()
        # Identical points have no size; the centre's own is better than a division by zero.
        size = torch.where(size > 1e-6 * mean.norm(), size, mean.norm().clamp_min(1e-6)).to(self.scale)
        centre = mean.view(x.shape[1:]).to(self.centre)
        share = (1 / (self.batches + 1)).clamp_min(0.01).to(self.scale)
        self.centre = torch.lerp(self.centre.expand_as(centre), centre, share)
        self.scale = torch.lerp(self.scale, size, share)
        self.batches = self.batches + 1

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Inside, scores are differentiated with respect to the points alone."""
        return frozen(self)

    def extra_repr(self) -> str:
        """How it is kept Lipschitz."""
        return f"lipschitz={self.lipschitz!r}" + f", penalty={self.penalty:g}" * self.penalised

    def _shares(self, labels: Tensor | None, points: int) -> Tensor:
        shapes = ((points,), (points, self.classes))
        if labels is None or labels.shape != shapes[labels.is_floating_point()]:
            found = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(
                f"A critic of {self.classes} classes needs with {points} points their classes, integers {shapes[0]}, or probabilities "
                f"{shapes[1]}, got {found}."
            )
        if not labels.is_floating_point():
            labels = F.one_hot(labels.long(), self.classes or -1)
        return labels.to(self.scale.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A module of the user's does not say what points it takes, before it has seen some.
        if self.shape is None and prefix + "centre" in state_dict:
            self.centre = self.centre.new_zeros(state_dict[prefix + "centre"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check(self, *clouds: Tensor) -> None:
        if torch.finfo(self.scale.dtype).bits < 32:
            raise ValueError(
                f"The critic's weights are {self.scale.dtype}, too coarse to compare means: keep it in float32 (critic.float())."
            )
        # A module of the user's takes what it has learned from, or what it is now given first.
        shape = self.shape or tuple(self.centre.shape) or tuple(clouds[0].shape[1:])
        for points in clouds:
            if points.shape[1:] != shape:
                raise ValueError(
                    f"The critic takes points of shape (N, {', '.join(map(str, shape))}), got {tuple(points.shape)}: make one for theirs."
                )
            if points.ndim < 2 or not points.is_floating_point():
                raise ValueError(
                    f"The critic takes floating points (N, ...), got {points.dtype} of shape {tuple(points.shape)}."
                )

    def _check_batch(self, *clouds: Tensor) -> None:
        self._check(*clouds)
        for points in clouds:
            if len(points) < 2:
                raise ValueError(
                    f"A critic learns from two samples or more on each side, got {len(points)}: use a larger batch."
                )
            if not bool(torch.isfinite(points).all()):
                raise ValueError(
                    "The critic's points hold NaN or infinite values: look for a model that diverged, or at the data."
                )


def check_settings(lipschitz: Lipschitz, penalty: float, width: int | None, depth: int, classes: int | None) -> None:
    """Refuse settings out of range, before a network is built.

    Raises:
        ValueError: naming the setting.
    """
    if lipschitz not in get_args(Lipschitz):
        raise ValueError(unknown_name("way to keep a critic Lipschitz:", lipschitz, get_args(Lipschitz)))
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be positive and finite, got {penalty}.")
    if width is not None and (width < 2 or width % 2):
        raise ValueError(f"width must be even and at least 2, for GroupSort sorts pairs, got {width}.")
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be at least 1, or None for a critic that knows none, got {classes}.")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}.")

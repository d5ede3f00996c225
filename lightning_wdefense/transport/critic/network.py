"""The critic: a 1-Lipschitz network whose gap estimates the 1-Wasserstein distance between two point clouds."""

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
"""The mean of a tensor over all ranks."""


class CriticObjective(NamedTuple):
    """The terms of a critic's training loss, all scalars.

    Attributes:
        loss: the loss to minimise: the penalty minus the gap.
        gap: mean score of ``x`` minus mean score of ``y``, in units of the points.
        penalty: the gradient penalty ``weight * mean (|gradient| - 1)^2``; 0 for a critic without a penalty.
        gradient_norm: mean norm of the critic's gradient between the clouds; NaN for a critic without a penalty.
    """

    loss: Tensor
    gap: Tensor
    penalty: Tensor
    gradient_norm: Tensor


class WassersteinCritic(nn.Module):
    r"""A 1-Lipschitz function of points. Its gap between two clouds is at most their 1-Wasserstein distance ``W_1``.

    By Kantorovich-Rubinstein duality, ``W_1(x, y) = max_f mean f(x) - mean f(y)`` over all 1-Lipschitz functions ``f``, the dual
    potentials. After training (:class:`CriticTraining`, :func:`critic_distance`), the critic's gap is an estimate of ``W_1`` from
    below.

    ``lipschitz`` chooses how the critic is kept 1-Lipschitz:

    - ``"orthogonal"``, the default: the layers are orthonormal matrices, with :class:`GroupSort` activations between them (Anil et
      al., 2019). The critic is 1-Lipschitz at any time, and there is no weight to choose;
    - ``"spectral-norm"``: every matrix is divided by an upper bound of its largest singular value, which is at most 1% too large
      (Miyato et al., 2018);
    - ``"gradient-penalty"``: the loss contains ``penalty * mean (|f'| - 1)^2`` at points between the clouds (WGAN-GP, Gulrajani et
      al., 2017);
    - ``"one-sided-penalty"``: the same, only where ``|f'| > 1`` (Petzka et al., 2018).

    With a penalty the gap can exceed ``W_1``, by about ``W_1^2 / (2 penalty)`` for scaled points. Therefore :meth:`distance` divides
    it by the gradient norm. :meth:`bounded_gap`, which a model can minimise, divides it where the gradient norm is above 1.

    Points are centred and divided by the size of a typical coordinate, which is estimated in training. Scores are in the units of
    the points. Everything is computed in the critic's own dtype without autocast: float32, unless you convert it to float64.

    Args:
        network: width ``D`` of the points, or their shape such as ``(1, 28, 28)``, to build a network (an MLP; for large images
            after convolutions); or a module from ``(N, ...)`` to ``(N,)`` or ``(N, 1)``.
        lipschitz: how the critic is kept 1-Lipschitz. For a module of your own, ``"orthogonal"`` and ``"spectral-norm"`` change its
            linear layers and convolutions in place, and its activations must be 1-Lipschitz. The penalties work for any module.
        penalty: weight of the gradient penalty.
        width: width of the hidden layers of a built network; ``None`` for the width of the points, between 64 and 256.
        depth: number of hidden layers of a built network.
        classes: number of classes, for one function per class. The critic then estimates the distance between the clouds of *each
            class*, and needs labels with the points. Only for a built network.
        seed: seed of the initial weights of a built network. PyTorch's global random state does not change.

    Raises:
        ValueError: if a setting is out of range, or the module has a layer that ``lipschitz`` does not allow, such as BatchNorm; in
            use, if points do not fit, are fewer than two, or are not finite.

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
                raise ValueError(
                    f"classes={classes} needs a built network, but network= is a {type(network).__name__}: give the shape of the points "
                    "instead."
                )
            self.network = network
        else:
            self.shape = (network,) if isinstance(network, int) else tuple(network)
            if not self.shape or min(self.shape) < 1:
                shape = ", ".join(map(str, self.shape))
                raise ValueError(f"The points must have at least one value, got shape (N, {shape}).")
            self.network = CriticNetwork(self.shape, width, depth, classes, seed).to(torch.get_default_device())
        self.orthonormal = constrain(self.network, lipschitz)
        # Not PyTorch's default dtype, which all threads share and which Trainers change.
        dtype = next((each.dtype for each in self.network.parameters() if each.is_floating_point()), torch.float32)
        self.register_buffer("centre", torch.zeros(self.shape or (), dtype=dtype))
        self.register_buffer("scale", torch.ones((), dtype=dtype))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @property
    def penalised(self) -> bool:
        """Whether the critic is kept Lipschitz by a gradient penalty, so that its gap can exceed ``W_1``."""
        return self.lipschitz in PENALISED

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores ``(N,)`` of points ``(N, ...)``, in units of the points, in the critic's own dtype.

        Args:
            points: points with the shape and device of the critic.
            labels: classes ``(N,)`` or class probabilities ``(N, K)``, required for a critic with ``classes``.

        Raises:
            ValueError: if the points or labels do not fit, or the network fails on them.
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
                f"got {tuple(scores.shape)}: change the last layer of its network."
            )
        return scores.reshape(len(points)) * self.scale

    def gap(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean score of ``x`` minus mean score of ``y``, a scalar in units of the points, differentiable in both.

        Args:
            x: points ``(N, ...)``.
            y: points ``(M, ...)``.
            labels: for a critic with classes, the labels of the samples in ``x`` and also in ``y``; then ``N = M``.
        """
        scores = self(torch.cat([x, y]), None if labels is None else torch.cat([labels, labels]))
        return scores[: len(x)].mean() - scores[len(x) :].mean()

    def distance(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate of ``W_1``, a scalar in units of the points: the gap, divided by the gradient norm for a critic with a penalty.

        Args:
            x: points ``(N, ...)``.
            y: points ``(M, ...)``.
            labels: as for :meth:`gap`.
            generator: random generator of the points between the clouds.
        """
        gap = self.gap(x, y, labels)
        return gap / self.gradient_norm(x, y, labels, generator=generator).mean() if self.penalised else gap

    def bounded_gap(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The gap for a model to minimise: for a critic with a penalty, divided by its gradient norm where this is above 1.

        The gradient norm is a constant for the gradient. With a weak penalty the gap can be many times ``W_1``; without the division
        the gradients in the points would be too large by the same factor.
        """
        gap = self.gap(x, y, labels)
        # Not where the norm is below 1: that would enlarge the gap of an untrained critic to that of a trained one.
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
        """Norm of the critic's gradient at random points between ``x`` and ``y``, ``(max(N, M),)``.

        Args:
            x: points ``(N, ...)``.
            y: points ``(M, ...)``.
            labels: as for :meth:`forward`, for ``max(N, M)`` points.
            generator: random generator of the points between the clouds.
            create_graph: whether the norm can be differentiated.
        """
        size = max(len(x), len(y))
        x, y = x.detach().to(self.scale.dtype), y.detach().to(self.scale.dtype)
        device = x.device if generator is None else generator.device
        generator = generator or torch.Generator(device).manual_seed(int(self.batches))
        share = torch.rand((size, *[1] * (x.ndim - 1)), generator=generator, dtype=torch.float32, device=device).to(x)
        rows = torch.arange(size, device=x.device)
        # Autocast would also cast the backward pass.
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), exact_products():
            between = torch.lerp(x[rows % len(x)], y[rows % len(y)], share).requires_grad_()
            (gradient,) = torch.autograd.grad(self(between, labels).sum(), between, create_graph=create_graph)
        return gradient.flatten(1).norm(dim=1)

    def objective(
        self, x: Tensor, y: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> CriticObjective:
        """The terms of the critic's training loss on ``x`` and ``y``, which are constants for the gradient."""
        gap = self.gap(x.detach(), y.detach(), labels)
        if not self.penalised:
            return CriticObjective(-gap, gap, torch.zeros_like(gap), torch.full_like(gap, torch.nan))
        norm = self.gradient_norm(x, y, labels, generator=generator, create_graph=True)
        excess = norm - 1
        if self.lipschitz == "one-sided-penalty":
            excess = excess.clamp_min(0)
        penalty = self.penalty * excess.square().mean()
        # The gap is divided by the scale, so that gap and penalty have the same balance as for normalised points.
        return CriticObjective(penalty - gap / self.scale, gap, penalty, norm.mean())

    @torch.no_grad()
    def adapt(self, x: Tensor, y: Tensor, average: Average | None = None) -> None:
        """Update the running means of centre and scale of the points.

        Args:
            x: points ``(N, ...)``.
            y: points ``(M, ...)``.
            average: mean of a tensor over all ranks, to have the same means on all of them.

        Raises:
            ValueError: if the points do not fit, are fewer than two, or are not finite.
        """
        self._check_batch(x, y)
        average = average or (lambda values: values)
        points = torch.cat([x, y]).to(self.scale.dtype).flatten(1)
        mean = average(points.mean(0))
        # Around the mean: far from the origin, the difference of two large squares would be a rounding error.
        size = average((points - mean).square().mean()).sqrt()
        # Identical points have size zero; the norm of the centre avoids a division by zero.
        size = torch.where(size > 1e-6 * mean.norm(), size, mean.norm().clamp_min(1e-6)).to(self.scale)
        centre = mean.view(x.shape[1:]).to(self.centre)
        share = (1 / (self.batches + 1)).clamp_min(0.01).to(self.scale)
        self.centre = torch.lerp(self.centre.expand_as(centre), centre, share)
        self.scale = torch.lerp(self.scale, size, share)
        self.batches = self.batches + 1

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Context in which scores are differentiated with respect to the points only, not to the weights."""
        return frozen(self)

    def extra_repr(self) -> str:
        """How the critic is kept Lipschitz, and the weight of its penalty."""
        return f"lipschitz={self.lipschitz!r}" + f", penalty={self.penalty:g}" * self.penalised

    def _shares(self, labels: Tensor | None, points: int) -> Tensor:
        shapes = ((points,), (points, self.classes))
        if labels is None or labels.shape != shapes[labels.is_floating_point()]:
            found = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(
                f"A critic of {self.classes} classes needs labels for the {points} points: classes, integers {shapes[0]}, or class "
                f"probabilities {shapes[1]}, got {found}."
            )
        if not labels.is_floating_point():
            labels = F.one_hot(labels.long(), self.classes or -1)
        return labels.to(self.scale.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # For a module of the user's own, the shape of the points is known only after the first batch.
        if self.shape is None and prefix + "centre" in state_dict:
            self.centre = self.centre.new_zeros(state_dict[prefix + "centre"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check(self, *clouds: Tensor) -> None:
        if torch.finfo(self.scale.dtype).bits < 32:
            raise ValueError(
                f"The critic's weights are {self.scale.dtype}, which is not precise enough to compare means. Keep the critic in float32: "
                "critic.float()."
            )
        # A module of the user's own takes the shape of its first points.
        shape = self.shape or tuple(self.centre.shape) or tuple(clouds[0].shape[1:])
        for points in clouds:
            if points.shape[1:] != shape:
                raise ValueError(
                    f"The critic takes points of shape (N, {', '.join(map(str, shape))}), got {tuple(points.shape)}: create a "
                    "critic for this shape."
                )
            if points.ndim < 2 or not points.is_floating_point():
                raise ValueError(
                    f"The critic takes points (N, ...) of a floating dtype, got {points.dtype} of shape {tuple(points.shape)}."
                )

    def _check_batch(self, *clouds: Tensor) -> None:
        self._check(*clouds)
        for points in clouds:
            if len(points) < 2:
                raise ValueError(
                    f"A critic is trained on two samples or more on each side, got {len(points)}: use a larger batch."
                )
            if not bool(torch.isfinite(points).all()):
                raise ValueError(
                    "The critic's points hold NaN or infinite values: check whether the model diverged, and check the data."
                )


def check_settings(lipschitz: Lipschitz, penalty: float, width: int | None, depth: int, classes: int | None) -> None:
    """Raise an error for settings out of range, before a network is built.

    Raises:
        ValueError: if a setting is out of range; the message names it.
    """
    if lipschitz not in get_args(Lipschitz):
        raise ValueError(unknown_name("value of lipschitz=", lipschitz, get_args(Lipschitz)))
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be positive and finite, got {penalty}.")
    if width is not None and (width < 2 or width % 2):
        raise ValueError(f"width must be even and at least 2, because GroupSort sorts pairs, got {width}.")
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be at least 1, or None for a critic without classes, got {classes}.")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}.")

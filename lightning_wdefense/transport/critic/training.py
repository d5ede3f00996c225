"""Training of critics: batch by batch, or once to estimate a distance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.transport.clouds.precision import exact_products
from lightning_wdefense.transport.critic.layerwise import LayerwiseMomentum
from lightning_wdefense.transport.critic.network import Average, CriticObjective, WassersteinCritic

MEMORY = 0.9
"""Decay of the running mean of the agreement between gradients, which so covers about ten batches."""


class CriticUpdate(NamedTuple):
    """The result of :meth:`CriticTraining.update`. All tensors are measured before training on the batch.

    Attributes:
        gap: mean score of ``x`` minus mean score of ``y``, ``()``, in units of the points; an estimate from unseen points.
        penalty: the gradient penalty, ``()``; 0 for a critic without a penalty.
        gradient_norm: mean norm of the critic's gradient between the clouds, ``()``; NaN for a critic without a penalty.
        steps: number of steps that the critic took on the batch.

    Example:
        >>> update = CriticTraining(WassersteinCritic(2)).update(torch.ones(4, 2), torch.zeros(4, 2))
        >>> update.steps >= 1, bool(update.distance <= 2**0.5)
        (True, True)
    """

    gap: Tensor
    penalty: Tensor
    gradient_norm: Tensor
    steps: int

    @property
    def distance(self) -> Tensor:
        """Estimate of ``W_1``, ``()``, in units of the points: the gap, divided by the gradient norm for a critic with a penalty."""
        return torch.where(self.gradient_norm.isnan(), self.gap, self.gap / self.gradient_norm)


class CriticTraining:
    """Trains a critic on pairs of batches, with more steps per batch when the critic is far from converged.

    If the critic has converged, the gradient on a new batch is noise, and more steps would only fit this noise. If the clouds have
    moved, the gradient has the direction of earlier gradients. So the number of steps follows the running cosine similarity between
    new gradients and the optimiser's momentum: one step at 0, ``max_steps`` steps at 1. This rule does not depend on the learning
    rate.

    Args:
        critic: the critic to train.
        lr: learning rate, the norm of a step of one layer, see :class:`LayerwiseMomentum`.
        max_steps: largest number of steps per batch.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> training = CriticTraining(WassersteinCritic(4))
        >>> noise = torch.Generator().manual_seed(0)
        >>> for _ in range(100):
        ...     y = torch.randn(64, 4, generator=noise)
        ...     update = training.update(y.roll(1, 0) + 1, y)  # moved by 1 in each of four coordinates: W_1 = 2
        >>> print(f"{update.gap:.1f}")
        2.0
    """

    def __init__(self, critic: WassersteinCritic, *, lr: float = 0.05, max_steps: int = 5) -> None:
        check_max_steps(max_steps)
        self.critic, self.max_steps = critic, max_steps
        self.optimizer = LayerwiseMomentum(critic, lr, critic.orthonormal)
        self.agreement = 0.0

    @torch.compiler.disable  # the penalty needs second derivatives, which compiled graphs do not support
    def update(
        self,
        x: Tensor,
        y: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        average: Average | None = None,
    ) -> CriticUpdate:
        """Train the critic on a batch. The points are constants for the gradient.

        Args:
            x: points ``(N, ...)`` whose scores increase.
            y: points ``(M, ...)`` whose scores decrease.
            labels: for a critic with classes, the labels of the samples in both: ``(N,)`` or probabilities ``(N, K)``.
            generator: random generator of the points at which a penalty is evaluated.
            average: mean of a tensor over all ranks. With it all ranks take bitwise equal steps.

        Raises:
            ValueError: if the points do not fit the critic, are fewer than two, or are not finite. The critic has then not changed.
        """
        # Autocast would also cast backward passes and the optimiser's matrix products.
        with torch.autocast(x.device.type, enabled=False), exact_products():
            backward = partial(self._backward, x, y, labels, generator, average)
            with self._adapted(x, y, average):
                first = backward()
            self.agreement = MEMORY * self.agreement + (1 - MEMORY) * self.optimizer.agreement()
            steps = 1 + round((self.max_steps - 1) * max(self.agreement, 0.0))
            self.optimizer.step()
            for _ in range(steps - 1):
                backward()
                self.optimizer.step()
            self.optimizer.zero_grad()
        return CriticUpdate(first.gap.detach(), first.penalty.detach(), first.gradient_norm.detach(), steps)

    def state_dict(self) -> dict[str, Any]:
        """State of the critic, the optimiser and the running agreement, for a checkpoint."""
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "agreement": self.agreement,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, so that training continues exactly where :meth:`state_dict` was called."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.agreement = state["agreement"]

    @contextlib.contextmanager
    def _adapted(self, x: Tensor, y: Tensor, average: Average | None) -> Iterator[None]:
        """Context with the critic's centre and scale updated for a batch; they are restored if the code inside fails."""
        critic = self.critic
        before = critic.centre, critic.scale, critic.batches
        critic.adapt(x, y, average)
        try:
            yield
        except BaseException:
            critic.centre, critic.scale, critic.batches = before
            raise

    def _backward(
        self,
        x: Tensor,
        y: Tensor,
        labels: Tensor | None,
        generator: torch.Generator | None,
        average: Average | None,
    ) -> CriticObjective:
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        with torch.enable_grad():
            objective = self.critic.objective(x, y, labels, generator=generator)
            gradients = torch.autograd.grad(objective.loss, parameters, materialize_grads=True)
        if average is not None:  # all gradients in one message
            flat = average(torch.cat([gradient.flatten() for gradient in gradients]))
            gradients = flat.split([each.numel() for each in parameters])
        for each, gradient in zip(parameters, gradients, strict=True):
            each.grad = gradient.view_as(each)
        return objective


def check_max_steps(max_steps: int) -> None:
    """Raise an error if a critic would never take a step.

    Raises:
        ValueError: if ``max_steps`` is below 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")


class CriticDistance(NamedTuple):
    """A critic's estimate of ``W_1``.

    Attributes:
        value: the estimate, ``()``, in units of the points.
        standard_error: standard error of ``value``, ``()``, if it is a mean over new samples; NaN for two given clouds.
        critic: the trained critic; its scores are the dual potential.

    Example:
        >>> distance = critic_distance(torch.ones(4, 2), torch.zeros(4, 2), steps=50)
        >>> print(f"{distance.value:.1f}")  # the norm of (1, 1)
        1.4
    """

    value: Tensor
    standard_error: Tensor
    critic: WassersteinCritic


def critic_distance(
    x: Tensor | Callable[[], tuple[Tensor, Tensor]],
    y: Tensor | None = None,
    *,
    critic: WassersteinCritic | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    lr: float = 0.05,
    seed: int = 0,
) -> CriticDistance:
    """Estimate of the 1-Wasserstein distance ``W_1``, by training a critic with a learning rate that decreases to 0.

    For two clouds the value is the trained critic's estimate of the distance between them, from below. In many dimensions it is far
    below the distance between *small* clouds: a few points in many dimensions are far apart even if the distributions are equal. If
    you can draw samples, pass a function. Then the estimate uses batches before the critic is trained on them, and converges to the
    distance between the distributions.

    Args:
        x: points ``(N, D)`` or ``(N, ...)``; or a function that draws a pair ``(x, y)`` of new batches.
        y: points ``(M, D)``; ``None`` if ``x`` is a function.
        critic: the critic to train; by default a new one for these points.
        steps: number of optimiser steps, one per batch.
        batch_size: number of points of each cloud in a step; smaller clouds are used whole.
        lr: learning rate at the first step, see :class:`LayerwiseMomentum`.
        seed: seed of the batches and of the new critic.

    Returns:
        The estimate, its standard error, and the trained critic.

    Raises:
        ValueError: if the points do not fit, are fewer than two, or are not finite, or a setting is out of range.

    Example:
        >>> noise = torch.Generator().manual_seed(0)
        >>> def draw():
        ...     return torch.randn(256, 2, generator=noise) + torch.tensor([3.0, 4.0]), torch.randn(256, 2, generator=noise)
        >>> print(f"{critic_distance(draw, steps=300).value:.1f}")
        5.0
    """
    if steps < 1 or batch_size < 2:
        raise ValueError(f"steps must be at least 1 and batch_size at least 2, got {steps} and {batch_size}.")
    if isinstance(x, Tensor) != isinstance(y, Tensor):
        raise ValueError(
            f"Pass two tensors x and y, or only x, a function that draws pairs of batches; got a {type(x).__name__} and a "
            f"{type(y).__name__}."
        )
    generator = torch.Generator().manual_seed(seed)
    draw = x if callable(x) else _batches(x, y, batch_size, generator)  # type: ignore[arg-type]
    first = draw()
    critic = critic or WassersteinCritic(first[0].shape[1:], seed=seed).to(first[0].device)
    training = CriticTraining(critic, lr=lr, max_steps=1)
    values = []
    for step in range(steps):
        for group in training.optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        batch = first if step == 0 else draw()
        values.append(training.update(*batch, generator=generator).distance)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        with torch.no_grad():
            value = critic.distance(x, y, generator=generator)
        return CriticDistance(value, torch.full_like(value, torch.nan), critic)
    late = torch.stack(values[-max(2, steps // 4) :])
    return CriticDistance(late.mean(), late.std() / len(late) ** 0.5, critic)


def _batches(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    def pick(points: Tensor) -> Tensor:
        if len(points) <= size:
            return points
        return points[torch.randperm(len(points), generator=generator)[:size].to(points.device)]

    return lambda: (pick(x.detach()), pick(y.detach()))

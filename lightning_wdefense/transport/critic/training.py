"""How a critic is trained: step by step on clouds that move, or once for a distance."""

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
"""Of the running agreement between batches: it is judged over some ten of them."""


class CriticUpdate(NamedTuple):
    """What a critic said of a batch before it learned from it, and how much it learned.

    Attributes:
        gap: mean score of ``x`` less that of ``y``, ``()``: what the critic makes of points that it has not seen.
        penalty: on the gradient, ``()``; 0 for a critic that needs none.
        gradient_norm: mean length of the gradient between the clouds, ``()``; NaN where the loss does not need it.
        steps: how many it took.
    """

    gap: Tensor
    penalty: Tensor
    gradient_norm: Tensor
    steps: int

    @property
    def distance(self) -> Tensor:
        """The gap, for a penalised critic divided by the length of its gradient: its estimate of ``W_1``, ``()``."""
        return torch.where(self.gradient_norm.isnan(), self.gap, self.gap / self.gradient_norm)


class CriticTraining:
    """Trains a critic on pairs of batches, as many steps on each as the critic is behind.

    Where the critic has converged, the gradient on a new batch is noise, and more steps on that batch would only fit the noise; where
    the clouds have moved on, it points where the last ones pointed. So the running cosine between new gradients and the optimiser's
    momentum says how far the critic is behind, whatever the learning rate: at 0 it takes one step, at 1 ``max_steps``.

    Args:
        critic: to train.
        lr: length of a step, see :class:`LayerwiseMomentum`.
        max_steps: most steps on a batch.

    Raises:
        ValueError: if a setting is out of its range.

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

    @torch.compiler.disable  # the penalty differentiates twice, which compiled graphs do not
    def update(
        self,
        x: Tensor,
        y: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        average: Average | None = None,
    ) -> CriticUpdate:
        """Learn from a batch: ``x`` ``(N, ...)`` and ``y`` ``(M, ...)``, which are constants.

        Args:
            x: the cloud that should score high.
            y: the other one.
            labels: of the samples in both, for a critic with classes: ``(N,)`` or probabilities ``(N, K)``.
            generator: source of the places where a penalty looks.
            average: the mean of a tensor over all ranks. With it all of them take the same steps, to the last bit.

        Raises:
            ValueError: if the points do not fit the critic, are fewer than two, or not finite; before anything is learned.
        """
        # Backward passes and the optimiser's products would be cast as well.
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
        """Critic, optimiser and pace, for a checkpoint."""
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "agreement": self.agreement,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.agreement = state["agreement"]

    @contextlib.contextmanager
    def _adapted(self, x: Tensor, y: Tensor, average: Average | None) -> Iterator[None]:
        """The critic takes note of a batch, unless it turns out not to do inside, as one may for a module of the user's."""
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
        if average is not None:  # all in one message
            flat = average(torch.cat([gradient.flatten() for gradient in gradients]))
            gradients = flat.split([each.numel() for each in parameters])
        for each, gradient in zip(parameters, gradients, strict=True):
            each.grad = gradient.view_as(each)
        return objective


def check_max_steps(max_steps: int) -> None:
    """Refuse a critic that never steps.

    Raises:
        ValueError: with what was given.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")


class CriticDistance(NamedTuple):
    """A critic's estimate of ``W_1``.

    Attributes:
        value: the estimate, in units of the points, ``()``.
        standard_error: of ``value`` where it is a mean over fresh samples, ``()``; NaN for two given clouds.
        critic: the one that was trained; its scores are the dual potential.
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
    """Estimate of the Wasserstein distance ``W_1`` by training a critic, with a learning rate that falls to 0.

    For two clouds it is the trained critic's gap between them, which no 1-Lipschitz function exceeds beyond their distance. In many dimensions
    it is far below the distance of *small* clouds, whose points are far apart just because they are few; where samples can be drawn, pass a
    function: then the gap is taken on batches before the critic learns from them, which estimates the distance of the distributions.

    Args:
        x: points ``(N, D)`` or ``(N, ...)``; or a function that draws a pair ``(x, y)`` of fresh batches.
        y: points ``(M, D)``; ``None`` where ``x`` is a function.
        critic: to train; by default a new one for these points.
        steps: of the optimiser; one a batch.
        batch_size: points of each cloud in a step; smaller clouds are used whole.
        lr: length of the first step, see :class:`LayerwiseMomentum`.
        seed: of the batches and of the new critic.

    Raises:
        ValueError: if the points do not fit, are fewer than two, or not finite, or a setting is out of its range.

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
        raise ValueError("Pass two clouds x and y, or one function that draws pairs of them.")
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

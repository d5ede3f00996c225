"""Generators: networks from inputs to purified inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_wdefense._seeding import seeded
from lightning_wdefense.attacks.threat import ThreatModel


class ResidualGenerator(nn.Module):
    """``inputs + g(inputs)``, where ``g`` is 0 at the start, so that the generator starts as the identity.

    For images ``g`` is a convolutional network that works for any image size; for other inputs it is an MLP. Its activations are
    smooth, so that attacks through the generator have useful gradients.

    Args:
        shape: shape of one sample: ``(C, H, W)`` for images, any other shape, or the number of values.
        width: number of channels or units of the hidden layers.
        depth: number of hidden layers.
        seed: seed of the initial weights. PyTorch's global random state does not change.

    Raises:
        ValueError: if ``shape`` holds no value, or ``width`` or ``depth`` is below 1.

    Example:
        >>> images = torch.rand(4, 3, 32, 32)
        >>> torch.equal(ResidualGenerator((3, 32, 32))(images), images)
        True
    """

    def __init__(self, shape: int | Sequence[int], *, width: int = 64, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must hold at least one value, got {shape}.")
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got {width} and {depth}.")
        images = len(shape) == 3
        size = shape[0] if images else math.prod(shape)

        def layer(inputs: int, outputs: int) -> nn.Module:
            return nn.Conv2d(inputs, outputs, 3, padding=1) if images else nn.Linear(inputs, outputs)

        with seeded(seed):
            layers: list[nn.Module] = [] if images else [nn.Flatten()]
            for index in range(depth):
                layers += [layer(width if index else size, width), nn.SiLU()]
            last = layer(width, size)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.correction = nn.Sequential(*layers, last)

    def forward(self, inputs: Tensor) -> Tensor:
        """Purified inputs ``(N, ...)``, of the shape of ``inputs``."""
        return inputs + self.correction(inputs).view_as(inputs)


class BoundedGenerator(nn.Module):
    """A generator whose outputs are checked for the shape of the inputs and clamped to the threat model's bounds.

    Args:
        generator: maps inputs ``(N, ...)`` in model units to purified inputs of the same shape.
        threat: the threat model; its bounds are in data units, its mean and std convert them to model units.
    """

    def __init__(self, generator: nn.Module, threat: ThreatModel) -> None:
        super().__init__()
        self.generator, self.threat = generator, threat

    def forward(self, inputs: Tensor) -> Tensor:
        """Purified inputs, in model units and in the dtype of ``inputs``.

        Raises:
            ValueError: if the generator cannot take the inputs, or changes their shape.
        """
        try:
            purified = self.generator(inputs)
        except RuntimeError as error:
            raise ValueError(
                f"The generator fails on inputs of shape {tuple(inputs.shape)}: {error}. Give the purifier a generator= for this shape, such "
                f"as ResidualGenerator({tuple(inputs.shape[1:])})."
            ) from error
        purified = check_purified(purified, inputs).to(inputs.dtype)
        if self.threat.bounds is None:
            return purified
        # The bounds, one per channel, are converted to model units, so that values inside them are not rounded by a conversion.
        like = (1, *inputs.shape[1:2], *[1] * (inputs.ndim - 2))
        low, high = (self.threat.to_model(purified.new_full(like, bound)) for bound in self.threat.bounds)
        return torch.clamp(purified, low, high)


def check_purified(purified: object, inputs: Tensor) -> Tensor:
    """Raise an error if purified inputs cannot replace the inputs.

    Raises:
        TypeError: if ``purified`` is not a tensor.
        ValueError: if its shape is not that of ``inputs``.
    """
    if not isinstance(purified, Tensor):
        raise TypeError(f"A purifier must return a tensor of purified inputs, got a {type(purified).__name__}.")
    if purified.shape != inputs.shape:
        raise ValueError(
            f"A purifier must return inputs of the same shape as it got, {tuple(inputs.shape)}, but returned {tuple(purified.shape)}."
        )
    return purified


def generator_for(classifier: nn.Module) -> ResidualGenerator:
    """A generator for the input shape of the classifier's first layer.

    Raises:
        ValueError: if the first layer does not determine the shape of the inputs.
    """
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels:
            return ResidualGenerator((layer.in_channels, 1, 1))
        if isinstance(layer, nn.Linear) and layer.in_features:
            return ResidualGenerator(layer.in_features)
        if any(True for _ in layer.parameters(recurse=False)):
            break
    raise ValueError(
        f"{type(classifier).__name__} does not begin with a Conv2d or Linear layer, so the shape of its inputs is not known: give generator= a "
        "module from inputs to inputs, such as ResidualGenerator((3, 32, 32))."
    )

"""Networks with Lipschitz constant 1: the default critic network, and constraints on the layers of any network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Lipschitz = Literal["orthogonal", "spectral-norm", "gradient-penalty", "one-sided-penalty"]
"""How a critic is kept 1-Lipschitz."""

PENALISED = ("gradient-penalty", "one-sided-penalty")
"""The values of ``lipschitz`` that are penalties in the loss, not constraints on the layers."""

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
_LARGEST_FLAT = 1024
"""Largest number of values of an image that is flattened for an MLP; larger images get convolutions."""
_SQUARINGS = 8
"""Number of squarings of a weight's Gram matrix, to bound its largest singular value."""


class GroupSort(nn.Module):
    """Activation that sorts pairs of channels: 1-Lipschitz with gradient norm 1 everywhere, unlike ReLU (Anil et al., 2019).

    Input ``(N, C, ...)`` with even ``C``. Channel ``i`` becomes the maximum of channels ``i`` and ``i + C / 2``, and channel
    ``i + C / 2`` the minimum.

    Example:
        >>> GroupSort()(torch.tensor([[1.0, 5.0, 3.0, 2.0]]))
        tensor([[3., 5., 1., 2.]])
    """

    def forward(self, values: Tensor) -> Tensor:
        """Sorted values, of the same shape."""
        one, other = values.chunk(2, dim=1)
        excess = (one - other).relu()  # the backward pass of torch.maximum takes three times as long
        return torch.cat([other + excess, one - excess], dim=1)


class CriticNetwork(nn.Module):
    """A network from ``(N, *shape)`` to ``(N, 1)`` with :class:`GroupSort`: an MLP, after convolutions for large images.

    The convolutions do not overlap (stride equals kernel size), so each is a linear map of patches, with the Lipschitz constant of
    one matrix. With ``classes``, the class of a sample shifts the first hidden layer. This gives one function per class, and does
    not change the Lipschitz constant in the points.

    Args:
        shape: shape of one point.
        width: width of the hidden layers; ``None`` for the width of the points, between 64 and 256.
        depth: number of hidden layers.
        classes: number of classes; ``None`` for one function without classes.
        seed: seed of the initial weights. They come from a separate generator, because the global one is shared by all threads.
    """

    def __init__(self, shape: Sequence[int], width: int | None, depth: int, classes: int | None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return _initialised(nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32), generator)

        patches: list[nn.Module] = []
        if len(shape) == 3 and math.prod(shape) > _LARGEST_FLAT:
            channels, height, side = shape
            out = 32
            while min(height, side) >= 8:
                pad = (0, -side % 2, 0, -height % 2)
                convolution = nn.utils.skip_init(nn.Conv2d, channels, out, 2, stride=2, dtype=torch.float32)
                patches += [nn.ZeroPad2d(pad), _initialised(convolution, generator), GroupSort()]
                channels, height, side, out = out, (height + 1) // 2, (side + 1) // 2, 2 * out
            shape = (channels, height, side)
        inputs = math.prod(shape)
        # With fewer channels than inputs, some directions of the inputs would be lost.
        width = width or min(max(64, inputs + inputs % 2), 256)
        layers: list[nn.Module] = [GroupSort()]
        for _ in range(depth - 1):
            layers += [linear(width, width), GroupSort()]
        self.first = nn.Sequential(*patches, nn.Flatten(), linear(inputs, width))
        self.shift = None if classes is None else ClassShift(classes, width, generator)
        self.rest = nn.Sequential(*layers, linear(width, 1))

    def forward(self, points: Tensor, classes: Tensor | None = None) -> Tensor:
        """Scores ``(N, 1)`` of points ``(N, ...)``, with class probabilities ``(N, K)`` if the network has classes."""
        hidden = self.first(points)
        return self.rest(hidden if self.shift is None or classes is None else hidden + classes @ self.shift.weight)


class ClassShift(nn.Module):
    """One vector per class, ``weight`` ``(K, width)``, that is added to a layer. The layer's Lipschitz constant does not change."""

    def __init__(self, classes: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(classes, width, generator=generator, dtype=torch.float32, device=generator.device)
        )


def _initialised(layer: _Layer, generator: torch.Generator) -> _Layer:
    """A linear layer or a convolution with PyTorch's default initialisation, drawn from a generator."""
    bound = as_matrix(layer.weight).shape[1] ** -0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def constrain(network: nn.Module, lipschitz: Lipschitz) -> list[Tensor]:
    """Make every layer of the network 1-Lipschitz, in place. With a penalty the network is not changed.

    Activations must already be 1-Lipschitz.

    Args:
        network: the network of a critic.
        lipschitz: the constraint.

    Returns:
        The weights that the training must keep orthonormal.

    Raises:
        ValueError: if the network has a layer that cannot be constrained in this way.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, _BATCH_STATISTICS):
            raise ValueError(
                f"The critic has a {type(layer).__name__} at {name!r}. Its output for one sample depends on the other samples, so neither a "
                "gradient penalty nor a constraint on the layers bounds its Lipschitz constant. Remove the layer, or use LayerNorm or "
                "GroupNorm with a gradient penalty."
            )
    if lipschitz in PENALISED:
        return []
    weights: list[Tensor] = []
    for name, layer in list(_layers_with_parameters(network)):
        if isinstance(layer, ClassShift):
            continue
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            raise ValueError(
                f"lipschitz={lipschitz!r} cannot constrain the {type(layer).__name__} at {name!r}, only linear layers and convolutions. "
                'Use "gradient-penalty", which works for any module.'
            )
        if getattr(layer, "padding_mode", "zeros") not in ("zeros", "circular"):
            raise ValueError(
                f"lipschitz={lipschitz!r} cannot bound the convolution at {name!r}: padding_mode={layer.padding_mode!r} repeats values. "
                'Use "zeros", or "gradient-penalty", which works for any module.'
            )
        overlap = _overlap(layer)
        if lipschitz == "spectral-norm":
            parametrize.register_parametrization(layer, "weight", _SpectralNorm(overlap**0.5))
        elif overlap > 1 or (isinstance(layer, _CONVOLUTIONS) and layer.groups > 1):
            raise ValueError(
                f'lipschitz="orthogonal" needs convolutions with stride equal to kernel size and one group. The one at {name!r} has kernel '
                f'{layer.kernel_size}, stride {layer.stride} and {layer.groups} groups: use "spectral-norm" or "gradient-penalty".'
            )
        else:
            weights.append(layer.weight)
            with torch.no_grad():
                as_matrix(layer.weight).copy_(_nearest_orthonormal(as_matrix(layer.weight)))
    return weights


def as_matrix(weight: Tensor) -> Tensor:
    """The weight of a linear layer or a convolution as a matrix ``(out, in)``, a view."""
    return weight.view(len(weight), -1)


def tangent(weight: Tensor, direction: Tensor) -> Tensor:
    """Projection of ``direction`` to the tangent space of the Stiefel manifold (orthonormal matrices) at ``weight``."""
    if weight.shape[0] <= weight.shape[1]:
        product = direction @ weight.mT
        return torch.addmm(direction, product + product.mT, weight, alpha=-0.5)
    product = weight.mT @ direction
    return torch.addmm(direction, weight, product + product.mT, alpha=-0.5)


def retract(weight: Tensor, length: float) -> Tensor:
    """The nearest orthonormal matrix to ``weight``, which is one tangent step of norm ``length`` (at most 1) away.

    Computed by Newton's iteration, which needs only matrix products.
    """
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.mT if wide else weight
    # Singular values are at most sqrt(1 + length^2); each iteration turns an error e into 1.5 e^2.
    for _ in range(2 if length <= 0.1 else 3 if length <= 0.3 else 6):
        tall = torch.addmm(tall, tall, tall.mT @ tall, beta=1.5, alpha=-0.5)
    return tall.mT if wide else tall


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _layers_with_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in network.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            yield name, layer


def _overlap(layer: nn.Module) -> int:
    """Largest number of patches of a convolution that contain one value.

    The convolution's norm is at most the square root of this number times the norm of its weight matrix.
    """
    if not isinstance(layer, _CONVOLUTIONS):
        return 1
    # Only patches whose positions are equal modulo the dilation share values.
    steps = (stride // math.gcd(stride, gap) for stride, gap in zip(layer.stride, layer.dilation, strict=True))
    return math.prod(-(-kernel // step) for kernel, step in zip(layer.kernel_size, steps, strict=True))


class _SpectralNorm(nn.Module):
    """Divides a weight by ``factor`` times an upper bound of its largest singular value, a Schatten norm.

    The Schatten norm ``(sum_i s_i^2m)^(1/2m)`` is never below the largest singular value. It exceeds it by at most 1%, for
    ``2m = 514`` and up to 256 singular values. Power iteration would be too small for a weight that changes (by up to 40% at large
    steps). The bound needs no state.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        matrix = as_matrix(weight)
        if len(matrix) < matrix.shape[1]:
            matrix = matrix.mT
        with torch.no_grad():
            tiny = torch.finfo(matrix.dtype).tiny
            gram = matrix.mT @ matrix
            log_size = gram.norm().clamp_min(tiny).log()
            power = gram / log_size.exp()
            for _ in range(_SQUARINGS):
                power = power @ power
                size = power.norm().clamp_min(tiny)
                power, log_size = power / size, 2 * log_size + size.log()
            trace = (power * gram).sum().clamp_min(tiny)
            norm = ((log_size + trace.log()) / (2 * (2**_SQUARINGS + 1))).exp()
            gradient = matrix @ power * (norm / trace)
        # The norm is homogeneous, so this product has both its value and its derivative.
        return weight / (self.factor * (gradient * matrix).sum().clamp_min(tiny))

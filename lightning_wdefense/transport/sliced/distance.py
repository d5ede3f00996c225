"""The sliced Wasserstein distance between weighted point clouds, as a function and as a module."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from lightning_wdefense.transport.clouds.measures import Measure, equal_masses, read_measures
from lightning_wdefense.transport.sliced.directions import orthogonal_directions, random_directions, read_directions
from lightning_wdefense.transport.sliced.max_direction import costs_along, max_direction
from lightning_wdefense.transport.sliced.options import Directions, SlicedOptions


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: float = 2,
    n_projections: int = 64,
    directions: Directions | Tensor = "orthogonal",
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sliced Wasserstein distance between two weighted point clouds (Rabin et al. 2012, Bonneel et al. 2015).

    The clouds are projected on ``K`` directions. The result is the mean of ``W_p^p`` between the projections, to the power
    ``1 / p``. With ``directions="max"`` it is ``W_p`` of the single direction where this is largest (Deshpande et al. 2019). The
    cost is ``O(K N (D + log N))`` for ``N`` points and ``D`` dimensions. There is no blur, no tolerance, and no iteration.

    The value is at most ``W_p``, and much smaller in high dimension: about ``|t| / sqrt(D)`` for a translation by ``t`` and
    ``p = 2`` (``|t|`` with ``"max"``). In one dimension it equals ``W_p``.

    Gradients reach ``x``, ``y``, ``a``, ``b`` and the caller's own ``directions``; they are 0 if the clouds are equal. Directions
    found by ``"max"`` are constants for the gradient (envelope theorem). The value is that of measures of mass ``sum(a)``, so ``b``
    is differentiated as ``b * sum(a) / sum(b)``. Everything is computed in float32 or better, without autocast; gradients have the
    dtype of the inputs. PyTorch's global random state does not change.

    Args:
        x: points ``(N, D)`` or ``(B, N, D)``, of a floating dtype.
        y: points ``(M, D)`` or ``(B, M, D)``.
        a: weights of ``x``, ``(N,)`` or ``(B, N)``, not negative; ``None`` for ``1 / N`` each. A point of weight zero is padding, and
            may have any value, even NaN or infinity; see :func:`sinkhorn`.
        b: weights of ``y``, ``(M,)`` or ``(B, M)``. Their sum must be that of ``a``, up to the rounding of their dtype.
        p: power of the distance, at least 1.
        n_projections: number of directions ``K``. For a translation in many dimensions and ``p = 2``, the relative standard error
            with independent directions is ``1 / sqrt(2 K)``, 9% for the default. With orthogonal directions it is 0 if ``K`` is a
            multiple of ``D``.
        directions: ``"orthogonal"`` for orthogonal blocks of up to ``D`` directions, with a smaller variance than independent
            directions (Rowland et al. 2019); ``"random"`` for independent directions; ``"max"`` for a local maximum that gradient
            ascent finds, starting from the best of ``n_projections`` orthogonal directions and the difference between the means,
            about ten times as slow; or vectors ``(K, D)`` of any norm but 0.
        seed: seed of the directions. The same seed gives the same directions, on all devices.
        generator: random generator of the directions, instead of ``seed``. It advances, so each call has new directions.

    Returns:
        The distance in units of the points, ``()`` or ``(B,)``, in float32 or better.

    Raises:
        TypeError: if an argument is of the wrong type, or points or weights are not of a floating dtype.
        ValueError: if shapes do not fit together, clouds are empty or not finite, weights are negative or have different sums, a
            setting is out of range, or a direction is zero.

    References:
        Rabin, Peyré, Delon, Bernot, "Wasserstein barycenter and its application to texture mixing", SSVM 2011 (LNCS 2012).
        Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein barycenters of measures", JMIV 2015.
        Deshpande et al., "Max-sliced Wasserstein distance and its use for GANs", CVPR 2019.
        Rowland, Hron, Tang, Choromanski, Sarlós, Weller, "Orthogonal estimation of Wasserstein distances", AISTATS 2019.

    Example:
        >>> import torch
        >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        >>> shifted = x + torch.tensor([0.0, 2.0, 0.0, 0.0])
        >>> round(sliced_wasserstein(x, shifted).item(), 3), round(sliced_wasserstein(x, shifted, directions="max").item(), 3)
        (1.0, 2.0)
    """
    options = SlicedOptions(p, n_projections, directions, seed)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}.")
    with torch.autocast(x.device.type if isinstance(x, Tensor) else "cpu", enabled=False):
        source, target = read_measures(x, y, a, b, None, None, balanced=False)
        equal_masses(source.weights, target.weights, a, b, "normalise them")
        value = _evaluate(source, target, options, generator, uniform=a is None and b is None)
    return value if x.ndim == 3 else value[0]


@torch.compiler.disable
def _evaluate(
    x: Measure, y: Measure, options: SlicedOptions, generator: torch.Generator | None, *, uniform: bool
) -> Tensor:
    # A common translation does not change the distance, and centred clouds have smaller rounding errors in their projections.
    centre = x.detached().mean()
    x, y = (measure._replace(points=measure.points - centre) for measure in (x, y))
    directions = _directions(x.points, options, generator)
    learned = isinstance(options.directions, str) and options.directions == "max"
    if learned and x.points.shape[-1] > 1:
        directions = max_direction(directions, x, y, options.p, uniform=uniform)
    costs, scale = costs_along(directions, x, y, options.p, uniform=uniform)
    mean = costs.mean(-1)
    # The power 1 / p has no derivative at 0, but 0 is a subgradient of the distance there.
    positive = mean > 0
    return torch.where(positive, torch.where(positive, mean, 1.0).pow(1 / options.p) * scale, 0.0)


def _directions(points: Tensor, options: SlicedOptions, generator: torch.Generator | None) -> Tensor:
    """Unit vectors ``(1, K, D)``."""
    if isinstance(options.directions, Tensor):
        return read_directions(options.directions, points)
    dim = points.shape[-1]
    if dim == 1:  # in one dimension there is only one direction
        return points.new_ones(1, 1, 1)
    generator = torch.Generator().manual_seed(options.seed) if generator is None else generator
    draw = random_directions if options.directions == "random" else orthogonal_directions
    return draw(options.n_projections, dim, generator).to(points).unsqueeze(0)


class SlicedWasserstein(nn.Module):
    """:func:`sliced_wasserstein` as a module without parameters, which keeps the settings.

    Args:
        p: power of the distance, at least 1.
        n_projections: number of directions.
        directions: ``"orthogonal"``, ``"random"``, ``"max"`` or vectors ``(K, D)``, which are a buffer of the module.
        seed: seed of the directions.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a setting is out of range.

    Example:
        >>> import torch
        >>> distance = SlicedWasserstein(n_projections=3)
        >>> distance
        SlicedWasserstein(p=2, n_projections=3, directions='orthogonal')
        >>> distance(torch.zeros(4, 3), torch.ones(5, 3))
        tensor(1.)
    """

    directions: Tensor | None

    def __init__(
        self,
        p: float = 2,
        n_projections: int = 64,
        directions: Directions | Tensor = "orthogonal",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = SlicedOptions(p, n_projections, directions, seed)
        given = directions if isinstance(directions, Tensor) else None
        self.register_buffer("directions", given, persistent=False)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Distance between ``x`` ``(N, D)`` and ``y`` ``(M, D)``, a scalar, or ``(B,)`` for batches of clouds."""
        settings = vars(self.options)
        if self.directions is not None:
            settings = {**settings, "directions": self.directions}
        return sliced_wasserstein(x, y, a, b, generator=generator, **settings)

    def extra_repr(self) -> str:
        """The power, the directions, and the seed if it is not the default."""
        if self.directions is not None:
            return f"p={self.options.p!r}, directions=<tensor {tuple(self.directions.shape)}>"
        unused = () if self.options.seed else ("seed",)
        return ", ".join(
            f"{f.name}={getattr(self.options, f.name)!r}" for f in fields(self.options) if f.name not in unused
        )

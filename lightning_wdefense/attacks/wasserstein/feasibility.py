"""Check adversarial images of a Wasserstein attack: exact transport cost, mass and bounds, from the two images alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.attacks.wasserstein.attack import check_ball
from lightning_wdefense.attacks.wasserstein.local_transport import Neighbourhood, check_images, clamp_rounding, square

UNMATCHED = 1e-4
"""Largest share of an image's mass that no local plan explains and that counts as rounding; above it the distance is infinite."""


class WassersteinFeasibility(NamedTuple):
    """The three constraint values of each image.

    Attributes:
        cost: ``W_p`` between the images for local plans, in pixels like ``eps``, ``(N,)``; infinite if no local plan
            exists.
        mass: largest change of the mass of a channel, relative to the image's mass, ``(N,)``.
        box: largest distance of a pixel from the bounds, relative to the largest legal value, ``(N,)``.

    Example:
        >>> found = WassersteinFeasibility(torch.tensor([0.1, 0.3]), torch.zeros(2), torch.zeros(2))
        >>> found.feasible(eps=0.2)
        tensor([ True, False])
    """

    cost: Tensor
    mass: Tensor
    box: Tensor

    def feasible(self, eps: float, tol: float = 1e-5) -> Tensor:
        """Which images satisfy all three constraints, ``(N,)``.

        Args:
            eps: the perturbation budget, in pixels.
            tol: relative tolerance of each constraint.
        """
        return (self.cost <= eps * (1 + tol)) & (self.mass <= tol) & (self.box <= tol)


def wasserstein_feasibility(
    inputs: Tensor, adversarial: Tensor, threat: ThreatModel, *, neighbourhood: int = 5, p: int = 1
) -> WassersteinFeasibility:
    """Exact transport cost, change of mass and violation of the bounds of adversarial images from any attack.

    The cost does not come from the attack's own plan. It is the optimum of a linear program for each channel, solved by
    HiGHS in float64, which takes some tenths of a second for an image of MNIST.

    Args:
        inputs: clean images ``(N, C, H, W)``, in model units.
        adversarial: adversarial images ``(N, C, H, W)``, in model units.
        threat: the threat model (norm ``wasserstein``).
        neighbourhood: side of the square that mass may move in, in pixels; odd.
        p: order of the distance, 1 or 2.

    Returns:
        The three constraint values of each image, in float64 on the CPU.

    Raises:
        ValueError: if the shapes differ, or for inputs and arguments that :class:`WassersteinAttack` refuses.
        RuntimeError: if HiGHS fails.

    References:
        Wong, Schmidt, Kolter, "Wasserstein adversarial examples via projected Sinkhorn iterations", ICML 2019 (the
        norm). Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018 (HiGHS).

    Example:
        >>> import torch
        >>> x, y = torch.zeros(2, 1, 1, 4, 4)
        >>> x[0, 0, 1, 1], y[0, 0, 1, 2] = 0.5, 0.5
        >>> found = wasserstein_feasibility(x, y, ThreatModel(norm="wasserstein", eps=1.0), neighbourhood=3)
        >>> [round(float(figure), 6) for figure in found]
        [1.0, 0.0, 0.0]
    """
    check_ball(threat, neighbourhood, p)
    if inputs.shape != adversarial.shape:
        raise ValueError(
            f"Clean and adversarial images must have the same shape, got {tuple(inputs.shape)} and {tuple(adversarial.shape)}."
        )
    x, y = (threat.to_data(images.detach().cpu().double()) for images in (inputs, adversarial))
    box = threat.box(x, precision=inputs.dtype)
    # Values that are only rounding of the conversion to data units are not mass.
    x = clamp_rounding(x, inputs.dtype)
    x = torch.where(x < 1e-7 * x.amax(), x.clamp_max(0), x)
    check_images(x, neighbourhood)
    total = x.sum((1, 2, 3))
    mass = (y.sum((2, 3)) - x.sum((2, 3))).abs().amax(1) / total
    over = torch.zeros_like(y) if box.high is None else (y - box.high).relu()
    top = x.amax() if threat.bounds is None else torch.tensor(threat.bounds[1])
    outside = (over + (-y).relu()).flatten(1).amax(1) / top
    near = square(neighbourhood, p)
    costs = []
    for clean, moved in zip(x, y.clamp_min(0), strict=True):
        found = [_local_cost(a.numpy(), b.numpy(), near) for a, b in zip(clean, moved, strict=True)]
        cost, unmatched = np.sum(found, axis=0)
        reachable = unmatched <= UNMATCHED * float(clean.sum())
        costs.append((cost / float(clean.sum())) ** (1 / p) if reachable else np.inf)
    return WassersteinFeasibility(torch.tensor(costs, dtype=torch.float64), mass, outside)


def _local_cost(x: np.ndarray, y: np.ndarray, near: Neighbourhood) -> tuple[float, float]:
    """The cost of the cheapest local plan between two images ``(H, W)``, and the mass that no local plan explains."""
    from scipy.optimize import linprog  # imported here because it takes half a second
    from scipy.sparse import coo_array, eye_array, hstack

    height, width = x.shape
    reach = near.size // 2
    sources, targets = np.flatnonzero(x > 0), np.flatnonzero(y > 0)
    if len(sources) == 0 and len(targets) == 0:
        return 0.0, 0.0
    number = np.full(height * width, -1)
    number[targets] = np.arange(len(targets))
    edges = []
    for place, cost in enumerate(near.costs):
        rows, columns = sources // width + place // near.size - reach, sources % width + place % near.size - reach
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        to = number[np.where(inside, rows * width + columns, 0)]
        inside &= to >= 0
        edges.append(np.stack([np.flatnonzero(inside), to[inside], np.full(inside.sum(), cost)]))
    source, target, price = np.concatenate(edges, axis=1)
    masses = np.concatenate([x.flat[sources], y.flat[targets]])
    one, count = np.ones(len(price)), np.arange(len(price))
    # One constraint for each source and each target. Unexplained mass costs more than any chain of moves through the image.
    ends = np.concatenate([source, target + len(sources)]).astype(int)
    both = coo_array(
        (np.concatenate([one, one]), (ends, np.concatenate([count, count]))), shape=(len(masses), len(price))
    )
    matrix, dear = hstack([both, eye_array(len(masses))]).tocsr(), max(near.costs) * (height + width)
    prices = np.concatenate([price, np.full(len(masses), dear)])
    solution = linprog(prices, A_eq=matrix, b_eq=masses, method="highs")
    if solution.x is None:
        raise RuntimeError(f"The linear program of an image's transport cost failed: {solution.message}")
    plan = solution.x[: len(price)]
    return float(price @ plan), float(solution.x[len(price) :].sum())

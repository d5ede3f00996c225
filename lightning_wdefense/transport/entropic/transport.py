"""Entropic optimal transport between point clouds, with the potentials and how well the iterations converged."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_wdefense.transport.entropic.evaluation import evaluate
from lightning_wdefense.transport.entropic.options import Cost, NamedCost, SinkhornOptions, Solver
from lightning_wdefense.transport.entropic.problem.arguments import Given
from lightning_wdefense.transport.entropic.warm_start import WarmStart


class SinkhornResult(NamedTuple):
    """What :func:`sinkhorn` found. ``B`` is absent from every shape if it was absent from the inputs.

    Attributes:
        value: the optimal value, ``()`` or ``(B,)``; the only field with a gradient.
        f: dual potential on ``x``, ``(N,)`` or ``(B, N)``, in units of the cost.
        g: dual potential on ``y``, ``(M,)`` or ``(B, M)``.
        n_iter: iterations taken, those of the annealing included; on a GPU, those of a kernel or, where they were not enough, those
            that followed. Of small problems on a CPU, steps of Sinkhorn's and of Newton's.
        marginal_error: root mean square of the relative error of the plan's marginals. It bounds their L1 error as a share
            of the mass, and foretells the error of the gradient better.
        converged: whether ``marginal_error`` is at most ``tol``.
        blur: the blur that was used, which a relative one depends on the data for.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    n_iter: int
    marginal_error: Tensor
    converged: Tensor
    blur: Tensor


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    blur: float | None = None,
    relative_blur: float = 0.2,
    reach: float | None = None,
    cost: Cost | NamedCost | None = None,
    label_cost: float | None = None,
    x_labels: Tensor | None = None,
    y_labels: Tensor | None = None,
    tol: float = 5e-4,
    max_iter: int = 1000,
    solver: Solver = "native",
    warm_start: WarmStart | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport between two weighted point clouds (Cuturi 2013).

    The value is the minimum over plans ``P`` of
    ``<P, C> + eps KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b)``, with the conventions of geomloss:
    ``C = |x - y|^p / p``, ``eps = blur^p``, ``rho = reach^p``, and infinite ``rho`` (marginals exactly ``a`` and ``b``)
    without ``reach``. It is not zero between equal clouds: :func:`sinkhorn_divergence` is.

    Gradients reach ``x``, ``y``, ``a`` and ``b`` by the envelope theorem, without a graph through the iterations, and can be
    differentiated again (``create_graph=True``) by the implicit function theorem. Computed in float32 or better whatever autocast says; gradients come back in the dtype of the inputs.

    Args:
        x: points ``(N, D)`` or ``(B, N, D)``, of a floating dtype.
        y: points ``(M, D)`` or ``(B, M, D)``.
        a: weights of ``x``, ``(N,)`` or ``(B, N)``, not negative; ``None`` for ``1 / N`` each. A point of weight zero is padding, of any
            value and label, NaN and infinite included: it changes nothing. Outside the box that all other points span it counts as
            the nearest place in it where its weight is differentiated and where potentials are asked for (with a cost of your own, as
            the point of the largest weight, wherever it is).
        b: weights of ``y``, likewise. Without ``reach`` they must sum to what ``a`` sums to, up to the rounding of their dtype.
        p: 1 for the distance as cost, 2 for half the squared distance.
        blur: scale below which the transport does not look, in units of the distance; wins over ``relative_blur``.
        relative_blur: blur in units of the typical distance of the batch, ``mean(C)^(1/p)`` between ``x`` and ``y``
            (without the label cost). It is recomputed at each call and is a constant for the gradient.
        reach: distance beyond which mass is rather destroyed and created than moved (Séjourné 2019); ``None`` for
            balanced transport.
        cost: differentiable ``(x, y) -> (N, M)``, or ``(B, N, M)`` if the inputs are batched, in place of
            ``|x - y|^p / p``; or ``"cosine"`` for ``1 - cos(x, y)``.
        label_cost: added to the cost where labels differ, in units of the cost. For soft labels it is multiplied by the
            total variation distance between them.
        x_labels: labels of ``x``: integers ``(N,)`` or ``(B, N)``, or probabilities ``(N, K)`` or ``(B, N, K)``.
            Unused without ``label_cost``, so that callers may always pass them.
        y_labels: labels of ``y``, likewise.
        tol: marginal error at which to stop.
        max_iter: most iterations, those of the annealing included.
        solver: ``"native"``, or ``"geomloss"`` for a second opinion (slower, blind to ``tol`` and ``max_iter``, and its
            unbalanced gradients are known to be too small by a factor of ``(rho + eps / 2) / (rho + eps)``).
        warm_start: potentials of the last call, to start from; updated in place. Not used by geomloss.

    Returns:
        The value, the potentials, and how well the iterations converged.

    Raises:
        TypeError: if an argument is of the wrong type, or points or weights are not of a floating dtype.
        ValueError: if shapes do not fit together, clouds are empty or not finite, weights are negative or their sums
            differ, a setting is out of its range, or ``label_cost`` is given without labels.

    Warns:
        SinkhornConvergenceWarning: if ``tol`` was not reached in ``max_iter`` iterations.

    References:
        Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", NeurIPS 2013.
        Séjourné, Feydy, Vialard, Trouvé, Peyré, "Sinkhorn divergences for unbalanced optimal transport", 2019.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> result = sinkhorn(x, x + torch.tensor([0.0, 2.0]), blur=0.01)
        >>> round(result.value.item(), 3), bool(result.converged)
        (2.0, True)
    """
    options = SinkhornOptions(p, blur, relative_blur, reach, cost, label_cost, tol, max_iter, solver)
    evaluation = evaluate(Given(x, y, a, b, x_labels, y_labels, options, debias=False), warm_start)
    solution = evaluation.optima["xy"]
    per_problem = evaluation.value, solution.f, solution.g, solution.error, evaluation.blur
    value, f, g, error, used_blur = per_problem if x.ndim == 3 else (tensor[0] for tensor in per_problem)
    return SinkhornResult(value, f, g, solution.n_iter, error, error <= tol, used_blur)

"""Entropic optimal transport between point clouds: value, dual potentials and convergence."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_wdefense.transport.entropic.evaluation import evaluate
from lightning_wdefense.transport.entropic.options import Cost, NamedCost, SinkhornOptions, Solver
from lightning_wdefense.transport.entropic.problem.arguments import Given
from lightning_wdefense.transport.entropic.warm_start import WarmStart


class SinkhornResult(NamedTuple):
    """The result of :func:`sinkhorn`. Without a batch in the inputs no shape has ``B``.

    Attributes:
        value: the optimal value, ``()`` or ``(B,)``; the only field with a gradient.
        f: dual potential on ``x``, ``(N,)`` or ``(B, N)``, in units of the cost.
        g: dual potential on ``y``, ``(M,)`` or ``(B, M)``.
        n_iter: number of iterations, including those of the annealing. On a GPU these are the iterations of the kernel, or, if they
            were not enough, the iterations after it. For small problems on a CPU, Sinkhorn's and Newton's steps both count.
        marginal_error: root mean square of the relative error of the plan's marginals. It is an upper bound of their L1 error as a
            share of the mass, and predicts the error of the gradient better than the L1 error does.
        converged: whether ``marginal_error`` is at most ``tol``.
        blur: the blur that was used, in units of the distance. A relative blur depends on the data.
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
    cost: NamedCost | Cost | None = None,
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
    ``C = |x - y|^p / p``, ``eps = blur^p`` and ``rho = reach^p``. Without ``reach``, ``rho`` is infinite and the marginals are
    exactly ``a`` and ``b``. The value is not zero between equal clouds; :func:`sinkhorn_divergence` is.

    Gradients with respect to ``x``, ``y``, ``a`` and ``b`` follow from the envelope theorem, without a graph through the iterations.
    They can be differentiated again (``create_graph=True``) by the implicit function theorem. All is computed in float32 or
    better, also under autocast; gradients have the dtype of the inputs.

    Args:
        x: points ``(N, D)`` or ``(B, N, D)``, of a floating dtype.
        y: points ``(M, D)`` or ``(B, M, D)``.
        a: weights of ``x``, ``(N,)`` or ``(B, N)``, not negative; ``None`` for ``1 / N`` each. A point of weight zero is padding. It
            may have any value and label, also NaN or infinity, and does not change the result. Its own potential, and the gradient
            in its weight, are those of the nearest place in the bounding box of the other points (with a cost function of your own,
            those of the point with the largest weight).
        b: weights of ``y``, likewise. Without ``reach`` their sum must equal that of ``a``, up to the rounding of their dtype.
        p: 1 for the distance as cost, 2 for half the squared distance.
        blur: scale of the entropic smoothing, in units of the distance (``eps = blur^p``). It takes precedence over ``relative_blur``.
        relative_blur: blur in units of the typical distance ``mean(C)^(1/p)`` between ``x`` and ``y`` (without the label cost). It is
            recomputed at each call and counts as a constant in the gradient.
        reach: distance beyond which destroying and creating mass is cheaper than moving it (Séjourné 2019); ``None`` for
            balanced transport.
        cost: differentiable ``(x, y) -> (N, M)``, or ``(B, N, M)`` if the inputs are batched, in place of
            ``|x - y|^p / p``; or ``"cosine"`` for ``1 - cos(x, y)``.
        label_cost: added to the cost where labels differ, in units of the cost. For soft labels it is multiplied by the
            total variation distance between them.
        x_labels: labels of ``x``: integers ``(N,)`` or ``(B, N)``, or probabilities ``(N, K)`` or ``(B, N, K)``.
            They may always be passed, and are used only with ``label_cost``.
        y_labels: labels of ``y``, likewise.
        tol: marginal error at which to stop.
        max_iter: maximum number of iterations, including those of the annealing.
        solver: ``"native"``, or ``"geomloss"`` for an independent check. geomloss is slower and ignores ``tol`` and ``max_iter``. Its
            unbalanced gradients are too small by a factor of ``(rho + eps / 2) / (rho + eps)``.
        warm_start: dual potentials of the last call to start from; updated in place. geomloss does not use them.

    Returns:
        The value, the dual potentials and the marginal error.

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

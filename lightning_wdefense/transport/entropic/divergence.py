"""The Sinkhorn divergence: debiased entropic transport, which is zero between equal point clouds."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor, nn

from lightning_wdefense.transport.entropic.evaluation import evaluate
from lightning_wdefense.transport.entropic.options import Cost, NamedCost, SinkhornOptions, Solver
from lightning_wdefense.transport.entropic.problem.arguments import Given
from lightning_wdefense.transport.entropic.warm_start import WarmStart


def sinkhorn_divergence(
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
) -> Tensor:
    r"""Sinkhorn divergence between two weighted point clouds (Feydy et al. 2019).

    ``S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + eps / 2 (sum a - sum b)^2``, where ``OT`` is the value of
    :func:`sinkhorn`. The three transports share one blur. Up to the tolerance, the divergence is zero if the clouds are equal and
    positive otherwise. It converges to the transport cost as the blur goes to 0, and to a kernel distance as the blur grows.

    The arguments, the gradients and the errors are those of :func:`sinkhorn`.

    Args:
        x: points ``(N, D)`` or ``(B, N, D)``, of a floating dtype.
        y: points ``(M, D)`` or ``(B, M, D)``.
        a: weights of ``x``, ``(N,)`` or ``(B, N)``; ``None`` for ``1 / N`` each. Points of weight zero are padding of any value.
        b: weights of ``y``, likewise. Without ``reach`` their sum must equal that of ``a``.
        p: 1 for the distance as cost, 2 for half the squared distance.
        blur: scale of the entropic smoothing, in units of the distance (``eps = blur^p``). It takes precedence over ``relative_blur``.
        relative_blur: blur in units of the typical distance between ``x`` and ``y``. It counts as a constant in the gradient.
        reach: distance beyond which destroying and creating mass is cheaper than moving it; ``None`` for balanced transport.
        cost: differentiable ``(x, y) -> (N, M)`` or ``(B, N, M)``, symmetric, in place of ``|x - y|^p / p``. The
            divergence is guaranteed to be positive only if ``exp(-cost / eps)`` is a positive definite kernel. Or ``"cosine"`` for
            ``1 - cos(x, y)``.
        label_cost: added to the cost where labels differ, also within a cloud, in units of the cost.
        x_labels: integers ``(N,)`` or ``(B, N)``, or probabilities ``(N, K)`` or ``(B, N, K)``; unused without
            ``label_cost``.
        y_labels: labels of ``y``, likewise.
        tol: marginal error at which to stop. The default keeps the error of the gradient below 1%.
        max_iter: maximum number of iterations, including those of the annealing.
        solver: ``"native"``, or ``"geomloss"`` for an independent check.
        warm_start: dual potentials of the last call to start from; updated in place.

    Returns:
        The divergence in units of the cost, ``()`` or ``(B,)``, in float32 or better.

    Raises:
        TypeError: if an argument is of the wrong type, or points or weights are not of a floating dtype.
        ValueError: if shapes do not fit together, clouds are empty or not finite, weights are negative or their sums
            differ, a setting is out of its range, or ``label_cost`` is given without labels.

    Warns:
        SinkhornConvergenceWarning: if ``tol`` was not reached in ``max_iter`` iterations.

    References:
        Feydy, Séjourné, Vialard, Amari, Trouvé, Peyré, "Interpolating between optimal transport and MMD using Sinkhorn
        divergences", AISTATS 2019.
        Séjourné, Feydy, Vialard, Trouvé, Peyré, "Sinkhorn divergences for unbalanced optimal transport", 2019.

    Example:
        A translation by ``t`` costs ``|t|^2 / 2`` for every blur:

        >>> import torch
        >>> x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        >>> round(sinkhorn_divergence(x, x + torch.tensor([0.0, 2.0])).item(), 3)
        2.0

        Clouds of different sizes form a batch by padding with points of weight zero:

        >>> weights = (torch.arange(16) < 10) / 10
        >>> padded = x.masked_fill(weights[:, None] == 0, torch.nan)
        >>> round(sinkhorn_divergence(padded, x[:10] + torch.tensor([0.0, 2.0]), weights).item(), 3)
        2.0
    """
    options = SinkhornOptions(p, blur, relative_blur, reach, cost, label_cost, tol, max_iter, solver)
    evaluation = evaluate(Given(x, y, a, b, x_labels, y_labels, options, debias=True), warm_start)
    value = evaluation.value
    # geomloss includes it already. Without weights the two sums are equal to the last bit.
    if reach is not None and solver == "native" and (a is not None or b is not None):
        source, target, *_ = evaluation.arguments
        excess = source.weights.sum(-1) - target.weights.sum(-1)
        value = value + 0.5 * evaluation.blur**p * excess.square()
    return value if x.ndim == 3 else value[0]


class SinkhornDivergence(nn.Module):
    """:func:`sinkhorn_divergence` as a module without parameters. The settings go to the constructor, the clouds to the call.

    Args:
        p: 1 for the distance as cost, 2 for half the squared distance.
        blur: absolute blur, in units of the distance. It takes precedence over ``relative_blur``.
        relative_blur: blur in units of the typical distance between the two clouds.
        reach: distance beyond which destroying and creating mass is cheaper than moving it; ``None`` for balanced transport.
        cost: differentiable and symmetric ``(x, y) -> cost matrix`` in place of ``|x - y|^p / p``, or ``"cosine"``.
        label_cost: added to the cost where labels differ, in units of the cost.
        tol: marginal error at which to stop.
        max_iter: maximum number of iterations, including those of the annealing.
        solver: ``"native"``, or ``"geomloss"`` for an independent check.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a setting is out of its range.

    Example:
        >>> import torch
        >>> divergence = SinkhornDivergence(blur=0.1)
        >>> divergence
        SinkhornDivergence(p=2, blur=0.1)
        >>> divergence(torch.zeros(4, 3), torch.ones(5, 3))
        tensor(1.5000)
    """

    def __init__(
        self,
        p: int = 2,
        blur: float | None = None,
        relative_blur: float = 0.2,
        reach: float | None = None,
        cost: NamedCost | Cost | None = None,
        label_cost: float | None = None,
        tol: float = 5e-4,
        max_iter: int = 1000,
        solver: Solver = "native",
    ) -> None:
        super().__init__()
        self.options = SinkhornOptions(p, blur, relative_blur, reach, cost, label_cost, tol, max_iter, solver)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        x_labels: Tensor | None = None,
        y_labels: Tensor | None = None,
        warm_start: WarmStart | None = None,
    ) -> Tensor:
        """Divergence between ``x`` ``(N, D)`` and ``y`` ``(M, D)``: a scalar, or ``(B,)`` for batches of clouds."""
        return sinkhorn_divergence(
            x, y, a, b, x_labels=x_labels, y_labels=y_labels, warm_start=warm_start, **vars(self.options)
        )

    def extra_repr(self) -> str:
        """The order of the cost, the blur that is used, and every setting that is not the default."""
        unused = "blur" if self.options.blur is None else "relative_blur"
        always = {"p", "blur", "relative_blur"} - {unused}
        values = {field: getattr(self.options, field.name) for field in fields(self.options) if field.name != unused}
        return ", ".join(f"{f.name}={value!r}" for f, value in values.items() if f.name in always or value != f.default)

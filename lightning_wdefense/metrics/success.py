"""Attack success rate: the share of correct predictions that an attack makes wrong."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense.metrics._plot import plot_values
from lightning_wdefense.metrics._predictions import is_correct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def attack_success_rate(
    clean_preds: Tensor, adversarial_preds: Tensor, target: Tensor, ignore_index: int | None = None
) -> Tensor:
    """Compute the share of the samples that are correct on clean inputs and wrong on adversarial inputs.

    Samples that are wrong on clean inputs are left out. So a low clean accuracy does not increase the success rate.

    Args:
        clean_preds: outputs on clean inputs: logits or probabilities ``(N, C, ...)``, class indices ``(N, ...)``, or
            the logits (not probabilities) of a binary classifier, ``(N,)`` or ``(N, 1, ...)``. With further dimensions
            each element counts.
        adversarial_preds: outputs on the attacked inputs, as ``clean_preds``.
        target: integer labels ``(N, ...)``, soft labels ``(N, C, ...)``, or binary labels as floats.
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.

    Returns:
        A scalar in [0, 1]; NaN if no sample is correct on its clean input.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If shapes do not match, a prediction is NaN, or a label is not a class of the logits.

    References:
        Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import attack_success_rate
        >>> clean, adversarial, target = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])
        >>> attack_success_rate(clean, adversarial, target)
        tensor(0.5000)
    """
    fooled, right = _count_fooled(clean_preds, adversarial_preds, target, ignore_index)
    return fooled / right


class AttackSuccessRate(Metric):
    """Share of the samples that are correct on clean inputs and wrong on adversarial inputs.

    ``update`` and ``forward`` accept ``clean_preds``, ``adversarial_preds`` and ``target``, with the shapes given in
    :func:`attack_success_rate`. ``compute`` returns a scalar in [0, 1], or NaN if no sample is correct on its clean
    input (also before any update, then with the warning that torchmetrics gives). Lower is better for the defender.

    Args:
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: In ``update``, if an argument is not a tensor.
        ValueError: In ``update``, if shapes do not match, a prediction is NaN, or a label is not a class of the logits.

    References:
        Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017.

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import AttackSuccessRate
        >>> metric = AttackSuccessRate()
        >>> metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    fooled: Tensor
    right: Tensor

    def __init__(self, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("fooled", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, clean_preds: Tensor, adversarial_preds: Tensor, target: Tensor) -> None:
        """Add a batch of predictions; see the class for shapes."""
        fooled, right = _count_fooled(clean_preds, adversarial_preds, target, self.ignore_index)
        self.fooled = self.fooled + fooled
        self.right = self.right + right

    def compute(self) -> Tensor:
        """Return the share in [0, 1], or NaN if no sample is correct on its clean input."""
        return self.fooled / self.right

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Plot ``val``, a result or a list of results over steps (by default what ``compute`` returns), on ``ax``."""
        return plot_values(self, val, ax)


def _count_fooled(
    clean_preds: Tensor, adversarial_preds: Tensor, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    right = is_correct(clean_preds, target, "clean_preds", ignore_index)
    fooled = right & ~is_correct(adversarial_preds, target, "adversarial_preds", ignore_index)
    return fooled.sum(), right.sum()

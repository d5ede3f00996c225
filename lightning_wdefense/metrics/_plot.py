"""Plots of metrics as in torchmetrics; matplotlib is imported only when something is drawn."""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def get_axes(ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
    """Return ``ax`` with its figure, or the axes of a new figure.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Plotting needs matplotlib. Install it with `pip install "lightning-wdefense[plot]"`.'
        ) from error
    if ax is None:
        return pyplot.subplots()
    return cast("Figure", ax.get_figure()), ax


def plot_values(metric: Metric, val: Any, ax: "Axes | None") -> tuple["Figure", "Axes"]:
    """Plot one result of ``metric``, or a list of results over steps. If ``val`` is None, compute the result first."""
    figure, ax = get_axes(ax)
    metric._plot(val, ax)
    return figure, ax


def draw_curve(
    ax: "Axes | None", x: Tensor, accuracies: Tensor, area: str, label: str | None, xlabel: str, ylabel: str
) -> tuple["Figure", "Axes"]:
    """Draw an accuracy curve on ``ax`` or new axes; ``area``, with ``label`` before it, names it in the legend."""
    figure, ax = get_axes(ax)
    name = area if label is None else f"{label} ({area})"
    ax.plot(x.cpu().numpy(), accuracies.cpu().numpy(), marker="o", label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.02, 1.02))
    ax.grid(True, alpha=0.3)
    ax.legend()
    return figure, ax

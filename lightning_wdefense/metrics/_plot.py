"""Plots of metrics as in torchmetrics; matplotlib is imported only when something is drawn."""

from typing import TYPE_CHECKING, Any, cast

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

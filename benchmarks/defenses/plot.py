"""The plot: robust accuracy against the time of training."""

from __future__ import annotations

from pathlib import Path

from sklearn.isotonic import isotonic_regression

from benchmarks.defenses.report import REFERENCES, Row, by_label, step_ratio
from benchmarks.shared.files import replacing
from benchmarks.shared.protocol import Protocol

GAP = 0.042
"""Of the height of the plot, between two labels."""
UNDEFENDED = "standard"
"""Far from all others on both axes: the table has it, and the plot would show little else."""


def plot(found: list[Row], protocol: Protocol, path: Path) -> None:
    """Points with error bars, each joined to its label in a column at the right, where labels never overlap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [row for row in found if row.name != UNDEFENDED] or found
    reference = by_label(found).get(REFERENCES[0])
    ratios = [step_ratio(row, reference, protocol.device) for row in found]
    times = [ratio[0] if ratio else row.per_run("cpu_s") for row, ratio in zip(found, ratios, strict=True)]
    figure, axes = plt.subplots(figsize=(10, max(5.0, 0.32 * len(found) + 1.5)), layout="constrained")
    for index, (row, time) in enumerate(zip(found, times, strict=True)):
        mean, half = 100 * row.robust.mean, 100 * (row.robust.half or 0)
        filled = None if row.strongest == "autoattack" else "white"
        axes.errorbar(
            time, mean, half or None, fmt="o", color=f"C{index % 10}", mfc=filled, capsize=3, lw=1.2, zorder=3
        )
    axes.margins(x=0.1)
    if max(times) > 4 * min(times):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    axes.set_xlabel(
        f"training step, multiples of {REFERENCES[0]}'s (same epochs for all)" if all(ratios) else "training, s"
    )
    axes.set_ylabel("robust accuracy, %")
    kinds = {row.strongest for row in found}
    legend = {"autoattack": "filled: AutoAttack", "apgd": "open: APGD-CE + APGD-T"}
    seeds = sorted({len(row.runs) for row in found})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    axes.set_title(
        f"{protocol.dataset}, L∞ {protocol.eps:.3g}; {', '.join(text for kind, text in legend.items() if kind in kinds)}; "
        f"bars: 95% over {count} seed{'s' * (count != '1')}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.canvas.draw()  # fixes the limits, in which the labels are placed
    bottom, top = axes.get_ylim()
    heights = _spread([(100 * row.robust.mean - bottom) / (top - bottom) for row in found])
    for index, (row, time, height) in enumerate(zip(found, times, heights, strict=True)):
        axes.annotate(
            f"{row.label}  {row.robust.text()}", (time, 100 * row.robust.mean), (1.03, height), "data", "axes fraction",
            color=f"C{index % 10}", fontsize=9, va="center",
            arrowprops={"arrowstyle": "-", "color": f"C{index % 10}", "lw": 0.6, "alpha": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def _spread(heights: list[float]) -> list[float]:
    """Falling heights, moved apart as little as will do (least squares), and into the plot."""
    apart = [GAP * index for index in range(len(heights))]
    level = isotonic_regression([height + down for height, down in zip(heights, apart, strict=True)], increasing=False)
    placed = [float(each) - down for each, down in zip(level, apart, strict=True)]
    shift = min(1 - placed[0], 0) or max(-placed[-1], 0)
    return [height + shift for height in placed]

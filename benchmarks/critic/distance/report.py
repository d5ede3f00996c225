"""Table and heat map of the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.critic.accuracy.measure import RATES
from benchmarks.critic.accuracy.report import draw
from benchmarks.critic.distance.measure import BATCHES, DIMENSIONS, OURS_LR, PEER_LR, SIZE
from benchmarks.shared.files import replacing


def markdown(results: dict[str, dict[str, list[float]]], seeds: int, machine: str) -> str:
    """Errors in per cent, a row for each setting, and what follows."""
    columns = [(name, dim) for name in ("ours", "plain WGAN-GP") for dim in DIMENSIONS]
    lines = [
        "# Critics on Gaussians whose distance is 1: error of W_1 in per cent",
        "",
        f"Mean error over {seeds} seeds (the standard error of a figure from sampling alone is about 1). Learning rates in multiples of "
        f"{OURS_LR} (ours) and {PEER_LR:g} (plain). For ours `penalty` means the gradient penalty in place of orthonormal layers, and "
        "`steps` the most that it may take on a batch.",
        "",
        "| setting | " + " | ".join(f"{name}, {dim}-D" for name, dim in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    settings = list(dict.fromkeys(key.split("|")[1] for key in results))
    for setting in settings:
        row = [f"{100 * _error(results, name, setting, dim):+.1f}" for name, dim in columns]
        lines.append(f"| {setting} | " + " | ".join(row) + " |")
    central = [f"lr x {rate:.3g}" for rate in RATES[2:5]]
    for name in ("ours", "plain WGAN-GP"):
        worst = max(abs(_error(results, name, setting, dim)) for setting in central for dim in DIMENSIONS)
        verdict = "within" if worst <= 0.05 else "not within"
        lines += [
            "",
            f"Over the central decade of learning rates the worst error of {name} is {100 * worst:.1f}%: {verdict} 5%.",
        ]
    command = "python -m benchmarks.critic --output benchmarks/results"
    return "\n".join([*lines, "", f"{BATCHES} batches of {SIZE} points. `{command}` on {machine}.", ""])


def _error(results: dict[str, dict[str, list[float]]], name: str, setting: str, dim: int) -> float:
    values = results[f"{name}|{setting}"][str(dim)]
    return sum(values) / len(values) - 1


def plot(results: dict[str, dict[str, list[float]]], accuracies: dict[str, Any], path: Path) -> None:
    """Heat map of the errors, beside that of the accuracies where there are some."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [(name, dim) for name in ("ours", "plain WGAN-GP") for dim in DIMENSIONS]
    settings = list(dict.fromkeys(key.split("|")[1] for key in results))
    table = [[100 * _error(results, name, setting, dim) for name, dim in columns] for setting in settings]
    if accuracies:
        figure, (axes, beside) = plt.subplots(1, 2, figsize=(13, 6.5), width_ratios=(2, 1), layout="constrained")
        draw(beside, accuracies["digits"]["results"])
    else:
        figure, axes = plt.subplots(figsize=(8, 6.5), layout="constrained")
    image = axes.imshow(table, cmap="RdBu", vmin=-50, vmax=50, aspect="auto")
    axes.set_xticks(range(len(columns)), ["\n".join([*name.split(), f"{dim}-D"]) for name, dim in columns])
    axes.set_yticks(range(len(settings)), settings)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:+.1f}", ha="center", va="center", color="white" if abs(value) > 30 else "black")
    axes.set_title("error of the critic's W_1, per cent")
    figure.colorbar(image, ax=axes)
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)

"""The plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gradients.losses import BY_CLASS, PAIRED, TRANSPORT
from benchmarks.gradients.report import KINDS, PLACES, QUESTIONS, Results, mean, settings
from benchmarks.shared.files import replacing

COLOURS = {PAIRED: "black", "Sinkhorn": "C0", "Sinkhorn p=1": "C9", "sliced": "C2", "critic": "C3", BY_CLASS: "C1"}


def plot(results: Results, path: Path) -> None:
    """Known pairs: bars of the parameters' cosines a stage. Fresh samples: cosines to the truth against the distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(setting for setting, _ in settings(results, "known pairs")))
    sources = list(dict.fromkeys(setting.split(",")[0] for setting, _ in settings(results, "fresh samples")))
    columns = max(len(stages), len(sources))
    figure, grid = plt.subplots(3, columns, figsize=(3.75 * columns, 10), squeeze=False, layout="constrained")
    losses = (PAIRED, *KINDS["known pairs"])
    for axes, stage in zip(grid[0], stages, strict=False):
        for index, key in enumerate(QUESTIONS):
            for place, loss in enumerate(losses):
                value = mean(results, "known pairs", stage, "64", loss, f"parameters {key}")
                axes.bar(
                    index * (len(losses) + 1) + place, value, color=COLOURS[loss], label=loss if not index else None
                )
        axes.set_xticks([2.5, 2.5 + len(losses) + 1], ["between batches", "with all images'"])
        axes.set_ylim(0, 1)
        axes.set_title(f"known pairs: {stage}", fontsize=10)
    grid[0][0].set_ylabel("cosine of the parameters' gradient")
    for row, place in zip(grid[1:], PLACES, strict=True):
        for axes, source in zip(row, sources, strict=False):
            shifts = [
                s for s, size in settings(results, "fresh samples") if size == "64" and s.startswith(source + ",")
            ]
            for loss in (PAIRED, *TRANSPORT):
                found = [mean(results, "fresh samples", shift, "64", loss, f"{place} true") for shift in shifts]
                distances = [float(shift.split()[-1]) for shift in shifts]
                axes.plot(distances, found, "o-", color=COLOURS[loss], label=loss, markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_xticks(distances, [f"{each:g}" for each in distances])
            axes.set_ylim(0, 1.03)
            axes.set_title(f"fresh samples: {source}", fontsize=10)
        row[0].set_ylabel(f"cosine of the {place}' gradient\nwith the true one")
    for axes in grid[2]:
        axes.set_xlabel("shift")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(losses))
    figure.suptitle("Gradients of paired L2 and of Wasserstein distances, minibatches of 64")
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)

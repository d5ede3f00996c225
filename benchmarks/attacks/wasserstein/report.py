"""The table and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shared.files import replacing
from benchmarks.shared.statistics import Estimate, estimate

Cell = dict[str, Any]
ENOUGH = 0.99
"""Of the budget, that is as good as all of it."""


def accuracy(cells: list[Cell], key: str = "broken") -> np.ndarray:
    """Accuracy of each cell, one a seed; images that were wrong without an attack stay wrong."""
    return np.array([1 - np.mean(np.logical_or(cell[key], cell["clean"])) for cell in cells])


class Lead(NamedTuple):
    """How much less accuracy ours leaves, paired by image and model.

    Attributes:
        mean: over both.
        low: end of the 95% bootstrap interval over images, all models of an image together.
        high: the other end.
        models: the mean with its 95% t-interval over models.
    """

    mean: float
    low: float
    high: float
    models: Estimate

    @property
    def sign(self) -> int:
        """1 or -1 where no interval holds 0."""
        half = self.models.half or 0.0
        return (min(self.low, self.mean - half) > 0) - (max(self.high, self.mean + half) < 0)

    def text(self) -> str:
        """In points."""
        half = "" if self.models.half is None else f" ± {100 * self.models.half:.1f}"
        return f"{100 * self.mean:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]{half}"


def lead(ours: list[Cell], theirs: list[Cell], draws: int = 4000) -> Lead:
    left = [
        np.array([~np.logical_or(cell["broken"], cell["clean"]) for cell in side], dtype=float)
        for side in (ours, theirs)
    ]
    difference = left[1] - left[0]
    drawn = np.random.default_rng(0).choice(difference.mean(0), (draws, difference.shape[1])).mean(1)
    models = estimate(difference.mean(1).tolist())
    assert models is not None
    return Lead(models.mean, *map(float, np.quantile(drawn, (0.025, 0.975))), models)


def _groups(cells: list[Cell]) -> dict[tuple[str, float, str], list[Cell]]:
    found: dict[tuple[str, float, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["model"], cell["eps"], cell["attack"]), []).append(cell)
    return found


def markdown(result: dict[str, Any], ours: str) -> str:
    about, groups = result["environment"], _groups(result["cells"])
    peers = [name for name in dict.fromkeys(name for _, _, name in groups) if name != ours]
    lines = [
        "# Accuracy under Wasserstein attacks, all constraints met",
        "",
        f"`{about['command']}`, on {about['hardware']}, torch {about['torch']}. {about['images']} test images of {about['dataset']}, "
        f"models of {' / '.join(map(str, about['seeds']))} seed(s), local plans of 5 x 5 pixels; eps in pixels. Ours: the four runs of its defaults with {about['steps']} steps, "
        f"early exit. Those published: {about['peer_steps']} steps, projection with two step sizes. Theirs are repaired by our repair, in two "
        "ways; each image counts by its worst. *Lead*: points by which ours leaves less accuracy, with the 95% bootstrap interval over images, and "
        "± half the 95% t-interval over models. In brackets their accuracy without any repair and clamped, whose images are not legal. *Spent*: median of the exact "
        "transport cost of ours, in eps, of images that it worked on to its end: those that resisted all runs (in brackets how many, over all models), and "
        f"after the bar the first {about['checked']} of each model without early exit, broken or not.",
        "",
        "| model | eps | ours | spent | " + " | ".join(f"{name} | lead" for name in peers) + " |",
        "|---" * (4 + 2 * len(peers)) + "|",
    ]
    for model, eps in dict.fromkeys((model, eps) for model, eps, _ in groups):
        own = groups[model, eps, ours]
        row = [model, f"{eps:g}", f"{100 * accuracy(own).mean():.1f}", _spent(own)]
        for name in peers:
            theirs = groups[model, eps, name]
            raw, clamped = (100 * accuracy(theirs, key).mean() for key in ("raw", "clamped"))
            row += [
                f"{100 * accuracy(theirs).mean():.1f} ({raw:.1f}, {clamped:.1f})",
                lead(own, theirs).text(),
            ]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", _verdict(groups, ours, peers), "", spending(groups, ours), "", _legality(result, ours), ""]
    return "\n".join(lines)


def _spent(cells: list[Cell]) -> str:
    resisting, thorough = _costs(cells, "resisting"), _costs(cells, "thorough")
    return (f"{np.median(resisting):.3f}" if resisting else "–") + f" ({len(resisting)}) \\| {np.median(thorough):.3f}"


def _costs(cells: list[Cell], key: str) -> list[float]:
    return [cost for cell in cells for cost in cell[key]]


def spending(groups: dict[tuple[str, float, str], list[Cell]], ours: str) -> str:
    """How much of the budget images spend, where the least."""
    least, short = {}, []
    for (model, eps, name), cells in groups.items():
        if name != ours:
            continue
        if found := _costs(cells, "resisting"):
            least[model, eps] = float(np.median(found))
        if (median := float(np.median(_costs(cells, "thorough")))) < ENOUGH:
            short.append(f"{median:.3f} for {model} at {eps:g}")
    text = (
        f"The median of what resisting images spend is {min(least.values()):.3f} of eps or more in all {len(least)} rows that have any; "
        if least
        else ""
    )
    return f"{text}without early exit {ENOUGH} or more but for these rows: {', '.join(short) or 'none'}."


def _verdict(groups: dict[tuple[str, float, str], list[Cell]], ours: str, peers: list[str]) -> str:
    places = dict.fromkeys((model, eps) for model, eps, _ in groups)
    below = above = tied = 0
    for model, eps in places:
        for name in peers:
            sign = lead(groups[model, eps, ours], groups[model, eps, name]).sign
            below, above, tied = below + (sign > 0), above + (sign < 0), tied + (sign == 0)
    return f"Of {below + above + tied} comparisons ours is below in {below}, above in {above}, and not told apart in {tied} (either interval holds 0)."


def _legality(result: dict[str, Any], ours: str) -> str:
    text = []
    for name in dict.fromkeys(cell["attack"] for cell in result["cells"]):
        found = [cell for cell in result["cells"] if cell["attack"] == name]
        bright = max((cell["brightest"] for cell in found if "brightest" in cell), default=None)
        text.append(
            f"{name}: legal to 1e-5 in {sum(cell['feasible'] for cell in found)} of {len(found)} cells (cost {max(c['cost'] for c in found):.6f} of eps, mass "
            f"{max(c['mass'] for c in found):.1e}, bounds {max(max(c['box'] for c in found), 0):.1e} at most)"
            + ("" if bright is None else f"; before the repair its pixels reached {bright:.1f}")
            + f"; {np.median([cell['seconds'] for cell in found]):.0f} s a cell (median)."
        )
    return (
        " ".join(text)
        + f" Transport costs are those of {result['environment']['checked']} images a cell, by linear programs. Seconds are of a machine that "
        "others used at the same time."
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = _groups(result["cells"])
    models, names = (list(dict.fromkeys(key[index] for key in groups)) for index in (0, 2))
    figure, axes = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, model in zip(axes[0], models, strict=True):
        for index, name in enumerate(names):
            epsilons = sorted(eps for each, eps, attack in groups if (each, attack) == (model, name))
            for key, style in (("broken", "-"), ("raw", ":")):
                found = [groups[model, eps, name] for eps in epsilons]
                if key in found[0][0]:
                    label = (
                        name + (", repaired" if "raw" in found[0][0] else "")
                        if key == "broken"
                        else f"{name}, not legal"
                    )
                    panel.plot(
                        epsilons,
                        [100 * accuracy(cells, key).mean() for cells in found],
                        style,
                        marker="o",
                        ms=3,
                        color=f"C{index}",
                        label=label,
                    )
        panel.set_title(model)
        panel.set_xlabel("eps, pixels")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=130)
    plt.close(figure)

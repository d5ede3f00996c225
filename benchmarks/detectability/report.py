"""The tables and the plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.shared.files import replacing
from benchmarks.shared.statistics import paired

MOVED = "wasserstein"
"""The attack that the others are compared with."""
Cell = dict[str, Any]
ABOUT = (
    "AUROC between clean test images that the model classifies correctly and those of them that the attack broke; 0.5 is chance, and below it the attacked images "
    "look more ordinary than the clean ones. Each attack "
    "has the radius at which it breaks the given share of validation images. Detectors learned from clean training images only. *Adaptive*: the "
    "attack knows the detector, lowers its score once an image is misclassified, and each image keeps the one with the lowest score, the "
    "non-adaptive one included. Intervals are 95% bootstrap intervals; over several seeds the mean, and the lowest and highest end.\n"
)


def mean_and_ends(values: list[list[float]]) -> str:
    values = [value for value in values if value[0] == value[0]]
    if not values:
        return "-"
    centre = sum(value for value, _, _ in values) / len(values)
    return f"{centre:.3f} [{min(low for _, low, _ in values):.2f}, {max(high for _, _, high in values):.2f}]"


def groups(cells: list[Cell]) -> dict[tuple[str, str, float], list[Cell]]:
    """The cells of all seeds by model, attack and success."""
    found: dict[tuple[str, str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["model"], cell["attack"], cell["success"]), []).append(cell)
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def differences(matched: dict[tuple[str, str, float], list[Cell]], detectors: list[str]) -> str:
    """By how much the Wasserstein attack's AUROC differs from that of each other attack."""
    rows = []
    for kind in ("plain", "adaptive"):
        for (model, attack, success), others in matched.items():
            moved = matched.get((model, MOVED, success), [])
            if attack == MOVED or not moved:
                continue
            row = []
            for name in detectors:
                ours, theirs = (
                    {cell["seed"]: cell[kind][name][0] for cell in side if cell[kind].get(name)}
                    for side in (moved, others)
                )
                found = paired(ours, theirs)
                row.append("-" if found is None else found.text(sign=True))
            count = len({cell["seed"] for cell in moved} & {cell["seed"] for cell in others})
            shown = "non-adaptive" if kind == "plain" else kind
            rows.append([model, attack, f"{success:.0%}", shown, str(count), *row])
    return (
        "AUROC in points, paired by model, ± half a 95% t-interval over models; below 0 the Wasserstein attack is the harder one to detect.\n\n"
        + table(["model", "less", "aim", "kind", "models", *detectors], rows)
    )


def markdown(result: dict[str, Any]) -> str:
    about, cells, detectors = result["environment"], result["cells"], result["detectors"]
    text = f"# How detectable attacks are, at equal success\n\n`{about['command']}`, on {about['hardware']}, torch {about['torch']}. Models of each kind: {' / '.join(map(str, about['seeds']))}. {ABOUT}"
    text += "".join(f"\n- Left out: {note}" for note in result["skipped"])
    matched = groups(cells)
    for kind in ("plain", "adaptive"):
        rows = []
        for (model, attack, success), found in matched.items():
            eps, reached = (sum(cell[key] for cell in found) / len(found) for key in ("eps", "reached"))
            values = [[cell[kind][name] for cell in found if cell[kind].get(name)] for name in detectors]
            if any(values):
                rows.append(
                    [model, attack, f"{success:.0%}", f"{reached:.0%}", f"{eps:.3g}", *map(mean_and_ends, values)]
                )
        title = "Non-adaptive" if kind == "plain" else "Adaptive"
        text += f"\n\n## {title}\n\n" + table(["model", "attack", "aim", "success", "eps", *detectors], rows)
    if any(cell["attack"] == MOVED for cell in cells):
        text += f"\n\n## `{MOVED}` less another attack\n\n" + differences(matched, detectors)
    statistics = result["statistics"]
    rows = [
        [
            model,
            attack,
            f"{success:.0%}",
            *(f"{sum(cell['power'][s] for cell in found) / len(found):.2f}" for s in statistics),
        ]
        for (model, attack, success), found in matched.items()
    ]
    rows += [
        [model, "none", "-", *(f"{power[s]:.2f}" for s in statistics)]
        for model, power in result["false_alarms"].items()
    ]
    text += (
        f"\n\n## Batches\n\nShare of batches of {about['batch']} attacked images (features) that a two-sample test against "
        f"{about['reference']} clean validation images, classified correctly, rejects at 5%; without an attack that is the rate of false alarms.\n\n"
    )
    return text + table(["model", "attack", "aim", *statistics], rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each model, success and kind; a row for each detector, a colour for each attack."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matched, detectors = groups(result["cells"]), result["detectors"]
    panels = sorted({(model, success) for model, _, success in matched})
    attacks = list(dict.fromkeys(attack for _, attack, _ in matched))
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(10, 0.42 * len(detectors) * len(panels) + 1.2),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for row, (model, success) in zip(axes, panels, strict=True):
        for panel, kind in zip(row, ("plain", "adaptive"), strict=True):
            for index, attack in enumerate(attacks):
                found = matched.get((model, attack, success), [])
                for place, name in enumerate(detectors):
                    values = [cell[kind][name] for cell in found if cell[kind].get(name)]
                    if not values:
                        continue
                    height = -place - 0.15 * (index - (len(attacks) - 1) / 2)
                    centre = sum(value for value, _, _ in values) / len(values)
                    ends = [min(low for _, low, _ in values), max(high for _, _, high in values)]
                    panel.plot(ends, [height] * 2, color=f"C{index}", lw=1.2)
                    panel.plot(centre, height, "o", color=f"C{index}", ms=4)
            panel.axvline(0.5, color="grey", ls="--", lw=1)
            panel.set_yticks(range(0, -len(detectors), -1), detectors if kind == "plain" else [""] * len(detectors))
            panel.set_title(
                f"{model}, success {success:.0%}, {'non-adaptive' if kind == 'plain' else kind}", fontsize=9
            )
            panel.grid(axis="x", alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("AUROC")
    handles = [plt.Line2D([], [], marker="o", color=f"C{index}", label=attack) for index, attack in enumerate(attacks)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(attacks), fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=150)

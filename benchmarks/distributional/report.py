"""The tables and the picture: accuracies over seeds, and paired differences at equal clean accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.distributional.measuring import ORDERS, RADII
from benchmarks.shared.statistics import Estimate, estimate, paired
from lightning_wdefense.metrics import distributional_accuracy

EPSILONS = (0.5, 1.0, 1.5, 2.0)
FRONTIER = ("standard", "pgd-at 1", "pgd-at 1.5", "pgd-at 2", "pgd-at 2.5", "pgd-at 3")
"""PGD training at growing radii, between which an accuracy is interpolated at a given clean accuracy."""
CONTROL = "pgd-at 1.5"
SMOOTHED = "gaussian-noise"
"""Trained for smoothing: its certified curve is drawn."""

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was measured, by label and seed."""


def columns() -> dict[str, tuple[str, float, float]]:
    """Names of the accuracies: which distances, order, radius."""
    found = {f"eps {eps:g}": ("l2", torch.inf, eps) for eps in EPSILONS}
    return found | {f"W_{p:g} {radius:g}": ("l2", p, radius) for p in ORDERS for radius in RADII["l2"]}


def accuracy(run: Mapping[str, Any], which: str, p: float, radius: float) -> float:
    return float(distributional_accuracy(torch.tensor(run[which]), [radius], p).accuracies[0])


def by_seed(runs: Runs, label: str, value: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
    return {seed: value(run) for seed, run in runs[label].items()}


def frontier(runs: Runs, seed: int, value: Callable[[Mapping[str, Any]], float]) -> list[tuple[float, float]]:
    """Clean accuracies and values of PGD training, ascending in clean accuracy, that no other radius beats in both.

    A model that is beaten in both is no choice that anybody would make. As a point of the frontier it would flatter everything near it.
    """
    known = [runs[label][seed] for label in FRONTIER if seed in runs.get(label, {})]
    points = sorted({(run["clean"], value(run)) for run in known})
    return [
        point
        for point in points
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    ]


def on_frontier(
    runs: Runs, clean: Mapping[int, float], value: Callable[[Mapping[str, Any]], float]
) -> dict[int, float]:
    """The accuracy of PGD training at this clean accuracy, by seed: interpolated between its radii, and beyond them that of the last."""
    return {
        seed: float(np.interp(target, *zip(*frontier(runs, seed, value), strict=True)))
        for seed, target in clean.items()
    }


def verdict(difference: Estimate | None) -> str:
    """In words: a difference whose interval contains 0 is a tie."""
    if difference is None or difference.half is None or abs(difference.mean) <= difference.half:
        return "tie"
    return "better" if difference.mean > 0 else "worse"


def summary(runs: Runs) -> list[dict[str, Any]]:
    """One row for each model."""
    rows = []
    for label in runs:
        clean = by_seed(runs, label, lambda run: run["clean"])
        row: dict[str, Any] = {"model": label, "seeds": len(clean), "clean": estimate(list(clean.values()))}
        for name, where in columns().items():

            def value(run: Mapping[str, Any], where: tuple[str, float, float] = where) -> float:
                return accuracy(run, *where)

            found = by_seed(runs, label, value)
            row[name] = estimate(list(found.values()))
            row[f"{name} - control"] = paired(found, by_seed(runs, CONTROL, value))
            row[f"{name} - frontier"] = paired(found, on_frontier(runs, clean, value))
        rows.append(row)
    return rows


def certified(runs: Runs) -> list[dict[str, Any]]:
    """Certified accuracy of the smoothed classifiers, pointwise and distributional."""
    rows = []
    for label, by in runs.items():
        known = {seed: run for seed, run in by.items() if "certified" in run}
        if known and any(max(run["certified"]) > 0 for run in known.values()):
            row: dict[str, Any] = {"model": label}
            for p in (torch.inf, *ORDERS):
                for radius in (0.25, 0.5, 0.75):
                    name = f"eps {radius:g}" if p == torch.inf else f"W_{p:g} {radius:g}"
                    row[name] = estimate([accuracy(run, "certified", p, radius) for run in known.values()])
            row["clean"] = estimate([accuracy(run, "certified", torch.inf, 0.0001) for run in known.values()])
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], sure: list[dict[str, Any]], attacked: Mapping[str, Any], head: str) -> str:
    names = list(columns())
    shown = ["clean", *names]
    parts = [
        head,
        "\n## Accuracy under attack\n",
        _table(["model", *shown], [[row["model"], *(row[n].text() for n in shown)] for row in rows]),
    ]
    picked = ["eps 1", "eps 1.5", "W_1 0.5", "W_2 0.5", "W_2 0.75", "W_2 1"]
    for against, text in (
        (
            "frontier",
            "Minus PGD training at the same clean accuracy, in points",
        ),
        ("control", f"Minus `{CONTROL}`, whatever the clean accuracy, in points"),
    ):
        body = [
            [
                row["model"],
                *(f"{row[f'{n} - {against}'].text(sign=True)} ({verdict(row[f'{n} - {against}'])})" for n in picked),
            ]
            for row in rows
            if row["model"] not in (FRONTIER if against == "frontier" else (CONTROL,))
        ]
        parts += [f"\n## {text}\n", _table(["model", *picked], body)]
    names = [name for name in sure[0] if name not in ("model", "clean")] if sure else []
    parts += [
        "\n## Certified lower bounds\n\nOf the classifiers smoothed by Gaussian noise, which are other classifiers than those above.\n",
        _table(
            ["model", "clean", *names],
            [[row["model"], row["clean"].text(), *(row[n].text() for n in names)] for row in sure],
        ),
        "\n## The greedy adversary on distances, and W-PGD\n\nPer cent left, greedy / W-PGD (100 steps, the smaller one of two losses; its "
        "budget is shared by all test images as one batch), seed 0.\n",
        *_against(attacked),
    ]
    return "\n".join(parts) + "\n"


def _against(attacked: Mapping[str, Any]) -> list[str]:
    """A table for each norm, and in how many cells W-PGD leaves less than the greedy adversary, which is optimal for exact distances."""
    found, cells, beaten = [], 0, 0
    for norm, radii in RADII.items():
        rows = []
        for model, balls in attacked.items():
            for ball, sides in balls.items():
                if ball.split()[0] == norm:
                    pairs = list(zip(sides["greedy"], sides["w-pgd"], strict=True))
                    cells, beaten = cells + len(pairs), beaten + sum(w < g - 1e-6 for g, w in pairs)
                    rows.append([model, ball.split()[1], *(f"{100 * g:.1f} / {100 * w:.1f}" for g, w in pairs)])
        found += [f"\n{norm}:\n\n" + _table(["model", "ball", *(f"radius {radius:g}" for radius in radii)], rows)]
    return [*found, f"\nW-PGD leaves less than the greedy adversary in {beaten} of {cells} cells."]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(runs: Runs, path: Any) -> None:
    """Distributional accuracy by radius, the mean over seeds, W_2 and pointwise side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    places = np.linspace(0.02, 2.5, 60)
    for axes, p, title in zip(
        figure.subplots(1, 2, sharey=True),
        (torch.inf, 2.0),
        ("each image: L2 eps", "all images: W_2 radius"),
        strict=True,
    ):
        for index, (label, by) in enumerate(runs.items()):
            curves = [
                distributional_accuracy(torch.tensor(run["l2"]), places, p).accuracies.numpy() for run in by.values()
            ]
            style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else ":"}
            axes.plot(places, np.mean(curves, axis=0), label=label, linewidth=1.4, **style)
        if sure := [run["certified"] for run in runs.get(SMOOTHED, {}).values() if "certified" in run]:
            curves = [distributional_accuracy(torch.tensor(radii), places, p).accuracies.numpy() for radii in sure]
            axes.plot(places, np.mean(curves, axis=0), "k--", label=f"{SMOOTHED}, smoothed: certified", linewidth=1.4)
        axes.set(xlabel=title, ylim=(0, 1.02), xlim=(0, 2.5))
        axes.grid(True, alpha=0.3)
    figure.axes[0].set_ylabel("accuracy left")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)

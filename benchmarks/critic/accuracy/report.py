"""Table and heat map of the robust accuracies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.critic.accuracy.measure import CENTRAL_DECADE, DECADES, DEFAULT, NONE, OURS, PENALTIES, PLAIN, STEPS
from benchmarks.shared.statistics import Estimate, estimate, paired

Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]
AXES = {
    "learning rate": DECADES,
    "learning rate, central decade": CENTRAL_DECADE,
    "steps": [f"{steps} steps" for steps in STEPS],
    "penalty": [f"penalty {penalty:g}" for penalty in PENALTIES],
    "penalty, central": [f"penalty {penalty:g}" for penalty in PENALTIES[1:3]],
}
SETTINGS = [setting for axis in ("learning rate", "steps", "penalty") for setting in AXES[axis]]
DEFAULTS = {OURS: {"lr x 1", "5 steps"}, PLAIN: {"lr x 1", "5 steps", "penalty 10"}}


def runs_of(runs: Runs, name: str, setting: str) -> Mapping[str, Mapping[str, Any]]:
    """By seed."""
    return runs.get(f"{name}|{DEFAULT if setting in DEFAULTS.get(name, ()) else setting}", {})


def robust(runs: Runs, name: str, setting: str = DEFAULT) -> dict[int, float]:
    """Robust accuracy by seed, of those that did not diverge."""
    return {int(seed): run["robust"] for seed, run in runs_of(runs, name, setting).items() if "robust" in run}


def by_seed(runs: Runs, name: str, settings: Sequence[str]) -> dict[int, list[float]]:
    """Robust accuracies of all settings, of the seeds that all have."""
    each = [robust(runs, name, setting) for setting in settings]
    return {seed: [values[seed] for values in each] for seed in sorted(set.intersection(*map(set, each)))}


def spread(runs: Runs, name: str, settings: Sequence[str]) -> Estimate | None:
    """Over the seeds that all settings have, largest less smallest robust accuracy."""
    return estimate([max(values) - min(values) for values in by_seed(runs, name, settings).values()])


def text(value: Estimate | None, *, sign: bool = False) -> str:
    """In per cent or points, with the number of seeds."""
    return "–" if value is None else f"{value.text(sign=sign)} ({value.count})"


def table(runs: Runs, settings: Sequence[str]) -> list[str]:
    """A row for each setting."""
    none = robust(runs, NONE)
    lines = [
        f"| setting | {OURS} | − {NONE} | {PLAIN} | − {NONE} | {OURS} − {PLAIN} |",
        "|---|---|---|---|---|---|",
        f"| {NONE} (`pgd-at`) | {text(estimate(list(none.values())))} | | | | |",
    ]
    rows = {setting: [robust(runs, name, setting) for name in (OURS, PLAIN)] for setting in settings}
    rows["mean of all settings"] = [
        {seed: statistics.mean(values) for seed, values in by_seed(runs, name, settings).items()}
        for name in (OURS, PLAIN)
    ]
    for setting, (ours, plain) in rows.items():
        row = []
        for found in (ours, plain):
            row += [text(estimate(list(found.values()))), text(paired(found, none), sign=True)]
        lines.append(f"| {setting} | " + " | ".join([*row, text(paired(ours, plain), sign=True)]) + " |")
    return lines


def diverged(runs: Runs) -> str:
    """Which runs did, in a sentence."""
    found = [f"{key}, seed {seed}" for key, each in runs.items() for seed, run in each.items() if "diverged" in run]
    return f"Diverged of {sum(len(each) for each in runs.values())} runs: {'; '.join(found) or 'none'}."


def markdown(stored: Mapping[str, Any]) -> str:
    """The section of the report."""
    runs, protocol = stored["digits"]["results"], stored["digits"]["protocol"]
    lines = [
        "## Robust accuracy of recipe `critic` on digits, per cent",
        "",
        f"Trained and attacked as in `benchmarks.defenses` (eps {protocol['eps']}, {protocol['epochs']} epochs, {protocol['test']} test images; what APGD-CE and APGD-T "
        "leave): means over seeds ± half a 95% t-interval, in brackets the number of seeds; differences in points, paired by seed. One setting is varied at "
        "a time, not the full product. The plain critic replaces ours and nothing else: it is told the classes in the same way, but has ReLU, a two-sided "
        "penalty, Adam (0, 0.9) at a constant rate and the same number of steps on every batch. For ours `penalty` means the gradient penalty in "
        "place of orthonormal layers.",
        "",
        *table(runs, SETTINGS),
        "",
        "Largest less smallest over an axis, in points (within a seed, then the mean over seeds; noise alone makes it positive):",
        "",
        f"| axis | {OURS} | {PLAIN} |",
        "|---|---|---|",
        *(
            f"| {axis} | {text(spread(runs, OURS, settings))} | {text(spread(runs, PLAIN, settings))} |"
            for axis, settings in AXES.items()
        ),
        "",
        diverged(runs),
    ]
    missing = sum(not runs_of(runs, name, setting) for name in (OURS, PLAIN) for setting in SETTINGS)
    if missing:
        lines.append(
            f"**Not complete**: {missing} of {2 * len(SETTINGS)} cells have not been measured yet (–); the command goes on where it was."
        )
    taken = sum("from" in run for each in runs.values() for run in each.values())
    if taken:
        lines.append(
            f"{taken} of them, of the same settings under the same protocol, are those of `defenses_digits.json`."
        )
    command = "python -m benchmarks.critic --accuracy-seeds 3"
    lines += ["", f"`{command}` on {stored['hardware']}."]
    if "mnist" in stored:
        found, protocol = stored["mnist"]["results"], stored["mnist"]["protocol"]
        lines += [
            "",
            f"The same on MNIST (eps {protocol['eps']}, {protocol['epochs']} epochs, {protocol['test']} test images, attacks in training in float32), over the central decade alone:",
            "",
            *table(found, CENTRAL_DECADE),
            "",
            diverged(found),
            "",
            f"`{command} --dataset mnist --data DIR` on {stored['hardware']}.",
        ]
    return "\n".join([*lines, ""])


def draw(axes: Any, runs: Runs) -> None:
    """Heat map of the mean robust accuracies."""
    names, none = (OURS, PLAIN), estimate(list(robust(runs, NONE).values()))
    means = [[estimate(list(robust(runs, name, setting).values())) for name in names] for setting in SETTINGS]
    table = [[float("nan") if value is None else 100 * value.mean for value in row] for row in means]
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), ["\n".join(name.split()) for name in names])
    axes.set_yticks(range(len(SETTINGS)), SETTINGS)
    middle = sum(image.get_clim()) / 2
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            label = "–" if value != value else f"{value:.1f}"
            axes.text(j, i, label, ha="center", va="center", color="black" if value > middle else "white")
    axes.set_title(f"robust accuracy, digits\n({NONE}: {'–' if none is None else none.text()})")
    axes.figure.colorbar(image, ax=axes)

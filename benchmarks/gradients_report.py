"""The table, the counts and the plot of ``gradients.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from defenses_statistics import paired
from gradients_losses import BY_CLASS, PAIRED, TRANSPORT

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
KINDS = {"known pairs": (*TRANSPORT, BY_CLASS), "fresh samples": TRANSPORT}
QUESTIONS = {"agree": "steadier", "true": "more meaningful"}
PLACES = ("points", "parameters")
COLOURS = {PAIRED: "black", "Sinkhorn": "C0", "Sinkhorn p=1": "C9", "sliced": "C2", "critic": "C3", BY_CLASS: "C1"}


class Count(NamedTuple):
    """In how many settings a loss does better than paired L2, worse, or is not separated from it."""

    better: int
    worse: int
    level: int

    def __str__(self) -> str:
        return f"{self.better} / {self.worse} / {self.level}"


def settings(results: Results, kind: str) -> list[tuple[str, str]]:
    """Setting and batch size."""
    found = [tuple(key.split("|")) for key in results]
    return list(dict.fromkeys((each[1], each[2]) for each in found if each[0] == kind))


def values(results: Results, kind: str, setting: str, size: str, loss: str, measure: str) -> dict[int, float]:
    """By seed."""
    return {int(seed): found[measure] for seed, found in results[f"{kind}|{setting}|{size}|{loss}"].items()}


def mean(results: Results, *where: str) -> float:
    found = values(results, *where)
    return sum(found.values()) / len(found)


def count(results: Results, kind: str, losses: tuple[str, ...], measure: str, only: str = "") -> Count:
    """Over all settings, or those whose name ends so, and over the losses."""
    verdicts = []
    for setting, size in settings(results, kind):
        if not setting.endswith(only):
            continue
        theirs = values(results, kind, setting, size, PAIRED, measure)
        for loss in losses:
            difference = paired(values(results, kind, setting, size, loss, measure), theirs)
            sure = difference is not None and difference.half is not None and abs(difference.mean) > difference.half
            verdicts.append((1 if difference.mean > 0 else -1) if difference and sure else 0)
    return Count(verdicts.count(1), verdicts.count(-1), verdicts.count(0))


def counts(results: Results) -> list[str]:
    """A row for each kind, place and question."""
    lines = [
        "| | gradient in | question | " + " | ".join((*TRANSPORT, BY_CLASS)) + " | all |",
        "|---" * (5 + len(TRANSPORT)) + "|",
    ]
    for kind, losses in KINDS.items():
        for place in PLACES:
            for key, question in QUESTIONS.items():
                each = [str(count(results, kind, (loss,), f"{place} {key}")) for loss in losses]
                each += ["–"] * (len(TRANSPORT) + 1 - len(each))
                total = f"**{count(results, kind, losses, f'{place} {key}')}**"
                lines.append(f"| {kind} | {place} | {question} | " + " | ".join([*each, total]) + " |")
    return lines


def follows(results: Results) -> list[str]:
    """What the counts say of the claim, in words that depend on them."""
    lines = []
    for kind, losses in KINDS.items():
        for key, question in QUESTIONS.items():
            places = ("parameters",) if kind == "known pairs" else PLACES
            for place in places:
                found = count(results, kind, losses, f"{place} {key}")
                if found.better > 2 * (found.worse + found.level):
                    verdict = "holds"
                elif found.worse > 2 * (found.better + found.level):
                    verdict = "is refuted: it is the other way round"
                elif found.better > found.worse:
                    verdict = "holds in part"
                else:
                    verdict = "does not hold"
                lines.append(
                    f"- {kind.capitalize()}, gradient in the {place}: that the gradient of a Wasserstein distance is *{question}* than "
                    f"that of paired L2 {verdict} (better in {found.better}, worse in {found.worse}, not separated in {found.level} of {sum(found)})."
                )
    return lines


def table(results: Results, kind: str) -> list[str]:
    """Cosines of every loss in every setting."""
    losses = (PAIRED, *KINDS[kind])
    lines = ["| setting | batch | measure | " + " | ".join(losses) + " |", "|---" * (3 + len(losses)) + "|"]
    for setting, size in settings(results, kind):
        for place in PLACES:
            for key in QUESTIONS:
                row = [f"{mean(results, kind, setting, size, loss, f'{place} {key}'):.2f}" for loss in losses]
                lines.append(f"| {setting} | {size} | {place} {key} | " + " | ".join(row) + " |")
    return lines


def spread(results: Results, kind: str) -> list[str]:
    """Of the parameters' gradients over minibatches, means over all settings of a batch size."""
    losses = (PAIRED, *KINDS[kind])
    lines = ["| | batch | measure | " + " | ".join(losses) + " |", "|---" * (3 + len(losses)) + "|"]
    found = settings(results, kind)
    for size in dict.fromkeys(size for _, size in found):
        for measure in ("noise", "norm spread"):
            row = []
            for loss in losses:
                each = sorted(mean(results, kind, setting, size, loss, measure) for setting, s in found if s == size)
                row.append(f"{each[len(each) // 2]:.2f}")
            lines.append(f"| {kind} | {size} | {measure} | " + " | ".join(row) + " |")
    return lines


def by_shift(results: Results) -> list[str]:
    """Counts at each distance."""
    shifts = dict.fromkeys(setting.split(", ")[1] for setting, _ in settings(results, "fresh samples"))
    lines = ["| gradient in | question | " + " | ".join(shifts) + " |", "|---" * (2 + len(shifts)) + "|"]
    for place in PLACES:
        for key, question in QUESTIONS.items():
            row = [str(count(results, "fresh samples", TRANSPORT, f"{place} {key}", f" {shift}")) for shift in shifts]
            lines.append(f"| {place} | {question} | " + " | ".join(row) + " |")
    return lines


def pull(results: Results) -> list[str]:
    """The force on the whole cloud along the shift."""
    losses = (PAIRED, *TRANSPORT)
    lines = ["| setting, batch of 64 | " + " | ".join(losses) + " |", "|---" * (1 + len(losses)) + "|"]
    for setting, size in settings(results, "fresh samples"):
        if size == "64":
            row = [f"{mean(results, 'fresh samples', setting, size, loss, 'pull'):.2f}" for loss in losses]
            lines.append(f"| {setting} | " + " | ".join(row) + " |")
    return lines


def markdown(results: Results, machine: str) -> str:
    """The report."""
    seeds = len(next(iter(results.values())))
    return "\n".join(
        [
            "# Gradients of Wasserstein distances and of paired L2",
            "",
            f"Five losses, {seeds} seeds; what is measured and what counts as steadier and more meaningful was written down beforehand, in the "
            "docstring of `benchmarks/gradients.py`.",
            "",
            "## What follows",
            "",
            *follows(results),
            "",
            CONCLUSION,
            "",
            "## Counts",
            "",
            "In how many settings a loss is better / worse than paired L2 / not separated from it. Where pairs are known, the points' rows are so by "
            "construction: a sample's gradient under paired L2 does not depend on the rest of its batch.",
            "",
            *counts(results),
            "",
            "## Noise",
            "",
            "Of the parameters' gradient over minibatches, the median over settings: standard deviation in units of the mean's length (`noise`), and of its "
            "norm in units of the mean norm.",
            "",
            *spread(results, "known pairs"),
            "",
            *spread(results, "fresh samples"),
            "",
            "## When the clouds separate",
            "",
            "Force on the whole cloud along the true shift (the derivative of the loss when the cloud moves along it); the clouds no longer overlap at "
            "shift 16. The p = 2 losses and L2 pull in proportion to the distance (the sliced one by 1/D of it); p = 1 and the critic with a force of at most 1.",
            "",
            *pull(results),
            "",
            "Better / worse / not separated, at each shift:",
            "",
            *by_shift(results),
            "",
            "## All cosines: known pairs",
            "",
            *table(results, "known pairs"),
            "",
            "## All cosines: fresh samples",
            "",
            *table(results, "fresh samples"),
            "",
            f"`python benchmarks/gradients.py --output benchmarks/results` on {machine}.",
            "",
        ]
    )


CONCLUSION = ""


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
    figure.savefig(path, dpi=110)
    plt.close(figure)

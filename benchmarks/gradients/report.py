"""The table and the counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.gradients.losses import BY_CLASS, PAIRED, TRANSPORT
from benchmarks.shared.statistics import paired

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
KINDS = {"known pairs": (*TRANSPORT, BY_CLASS), "fresh samples": TRANSPORT}
QUESTIONS = {"agree": "steadier", "true": "more meaningful"}
PLACES = ("points", "parameters")


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
                if 3 * found.better > 2 * sum(found):
                    verdict = "holds"
                elif 3 * found.worse > 2 * sum(found):
                    verdict = "is refuted"
                else:
                    verdict = "is not confirmed"
                lines.append(
                    f"- {kind.capitalize()}, gradient in the {place}: that the gradient of a Wasserstein distance is *{question}* than "
                    f"that of paired L2 {verdict} (better in {found.better}, worse in {found.worse}, not separated in {found.level} of {sum(found)})."
                )
    return lines


def conclusion(results: Results) -> str:
    """With the means over all settings of batches of 64, and for fresh samples those at one shift."""

    def over(kind: str, loss: str, measure: str, end: str = "") -> str:
        found = [each for each in settings(results, kind) if each[1] == "64" and each[0].endswith(end)]
        values = [mean(results, kind, *each, loss, measure) for each in found]
        return f"{sum(values) / len(values):.2f}"

    def listed(kind: str, measure: str, end: str = "") -> str:
        return ", ".join(f"{loss} {over(kind, loss, measure, end)}" for loss in (PAIRED, *KINDS[kind]))

    each = {loss: count(results, "known pairs", (loss,), "parameters agree") for loss in KINDS["known pairs"]}
    steadier = ", ".join(f"{loss} ({found})" for loss, found in each.items() if 2 * found.better > sum(found)) or "none"
    shifts = list(dict.fromkeys(setting.split()[-1] for setting, _ in settings(results, "fresh samples")))
    shift = "1" if "1" in shifts else shifts[0]
    return "\n\n".join(
        [
            "Where pairs are known, as in adversarial training, the pairing is knowledge that a transport has to guess anew from every batch. Mean "
            f"cosine of the parameters' gradient of a batch of 64 with the true one: {listed('known pairs', 'parameters true')}; between batches: "
            f"{listed('known pairs', 'parameters agree')}. Steadier in more settings than not: {steadier}. So a steadier gradient is no reason to prefer a Wasserstein distance to paired L2 there: what "
            "one gains, it gains by asking for something else. (The true gradient is each loss's own; whether it makes a model robust is for "
            "`benchmarks.defenses` to say.)",
            "Where there are no pairs, L2 pairs at random. Its gradient then draws each sample towards a stranger, which contracts the cloud while it "
            "moves it: in the parameters it agrees between batches about as well as others do, but on the wrong thing. Mean cosine with the true "
            f"direction at shift {shift}, batches of 64, in the points: {listed('fresh samples', 'points true', f'shift {shift}')}; in the parameters: "
            f"{listed('fresh samples', 'parameters true', f'shift {shift}')}. The critic is ahead, and has learned from many earlier batches, where "
            "the others know only the present one. No loss here loses its gradient when the clouds no longer overlap, L2 included.",
        ]
    )


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
            "docstring of `benchmarks/gradients/__main__.py`.",
            "",
            "## What follows",
            "",
            *follows(results),
            "",
            conclusion(results),
            "",
            "*Holds*: better in more than two thirds of the settings; *refuted*: worse in more than two thirds.",
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
            f"`python -m benchmarks.gradients --output benchmarks/results` on {machine}.",
            "",
        ]
    )

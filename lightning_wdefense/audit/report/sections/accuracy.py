"""Accuracies with their intervals, by attack and by eps, and distances."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.audit.report.pages.charts.bars import Bar, bars, histogram, interval, percent
from lightning_wdefense.audit.report.pages.charts.curves import Curve, curves
from lightning_wdefense.audit.report.pages.page import Block, Chart, Figures, Section, Text
from lightning_wdefense.audit.report.words import eps_in_words, listed
from lightning_wdefense.evaluation.intervals import wilson_interval
from lightning_wdefense.evaluation.result import CLEAN, ROBUST, EvaluationResult

STANDARD = "autoattack"
"""The attack without which an accuracy is no claim of robustness."""

BLUE, ORANGE = 0, 1


def headline(result: EvaluationResult) -> Figures:
    """The numbers that the report is about."""
    values, intervals = result.values, result.intervals
    items = [
        (name, percent(values[key]), f"95% interval {interval(*intervals[key])}")
        for name, key in (("Clean accuracy", CLEAN), ("Robust accuracy", ROBUST))
    ]
    if "auac" in values:
        items.append(("Mean over eps", percent(values["auac"]), "area under the accuracy curve (AUAC)"))
    if "median_distance" in values:
        items.append(("Median distance", _number(values["median_distance"]), "to the decision boundary, in data units"))
    if "distributional_acc" in values:
        items.append(
            (
                "Distributional",
                percent(values["distributional_acc"]),
                "accuracy left if the distribution of inputs moves by eps",
            )
        )
    return Figures(tuple(items))


def meaning(result: EvaluationResult) -> Iterator[Text]:
    """What the robust accuracy says, and what it does not say."""
    attacks = listed(result.attacks)
    masks = (
        " A mask counts as one sample in the intervals, and each of its labels in the accuracies."
        if "pixels" in result.samples
        else ""
    )
    what = f"the labels of {result.count} masks" if "pixels" in result.samples else f"{result.count} samples"
    yield Text(
        f"What this means: of {what}, {percent(result.robust_acc)} are classified correctly before and after {attacks}. That is an upper "
        "bound of the robust accuracy: a stronger attack may leave less. The interval says how well these samples stand for "
        f"others of their kind; it says nothing of stronger attacks, other threats or other data.{masks}"
    )
    if not any(STANDARD in name for name in result.attacks):
        yield Text(
            f"No attack of this evaluation is called {STANDARD}, the published standard: take the figure as a watch on training, and not as a "
            "claim of robustness.",
            note=True,
        )
    missing = sum(int((result.samples[name] < 0).sum()) for name in ("clean",) if name in result.samples)
    if missing:
        yield Text(f"The outputs of {missing} clean inputs are NaN or infinite. They count as wrong.")


def accuracy_section(result: EvaluationResult) -> Section:
    """What each attack left, and the accuracy at every eps."""
    blocks: list[Block] = [_by_attack(result)]
    if result.curve is not None:
        blocks.append(accuracy_curve([("", result)], result.threat))
    if math.isfinite(result.values.get("transport_shift", math.nan)):
        blocks.append(
            Text(
                f"The attacks move the features by a Sinkhorn divergence of {_number(result.values['transport_shift'])}, in squared units of the "
                "features: a number for comparing versions of one model.",
                note=True,
            )
        )
    return Section("Accuracy", tuple(blocks))


def accuracy_curve(results: list[tuple[str, EvaluationResult]], threat: ThreatModel) -> Chart:
    """The accuracy curves of results that have one, by their names."""
    drawn = []
    for name, result in results:
        if result.curve is not None:
            shares = result.curve.accuracies.tolist()
            ends = [wilson_interval(share, result.count) for share in shares]
            drawn.append(Curve(name, result.curve.epsilons.tolist(), shares, ends))
    return curves(
        "Accuracy by eps",
        drawn,
        f"eps ({threat.norm}, data units)",
        threat.eps,
        f"eps {eps_in_words(threat)}",
        "The band is the 95% interval at each eps. As eps grows, accuracy must fall to that of a guess: where it does not, the attacks fail.",
    )


def distance_section(result: EvaluationResult) -> Section | None:
    """How far samples are from the decision boundary, if that was measured."""
    distances = result.samples.get("distance")
    if distances is None:
        return None
    right = distances[result.samples["clean_right"] > 0]
    found, lost = right[right.isfinite()], int((~right.isfinite()).sum())
    blocks: list[Block] = []
    if len(found):
        caption = (
            f"{len(found)} samples that are right on their clean input; those within eps are drawn in orange. A distance is an upper bound: a "
            "better attack may find a nearer adversarial input."
        )
        xlabel, name = f"distance ({result.threat.norm}, data units)", f"eps {eps_in_words(result.threat)}"
        blocks.append(histogram("Distances to the decision boundary", found, result.threat.eps, name, xlabel, caption))
    if lost:
        blocks.append(
            Text(
                f"For {lost} samples no adversarial input was found at any distance. That says as much of the attack as of the model."
            )
        )
    if not len(right):
        blocks.append(Text("No sample is right on its clean input, so all distances are 0."))
    if "distributional_acc" in result.values:
        blocks.append(
            Text(
                f"Distributional accuracy {percent(result.values['distributional_acc'])}: what is left if the attacker has one budget for all "
                f"samples together, so that the distribution of inputs moves by a Wasserstein distance of at most {eps_in_words(result.threat)}. "
                "It spends the budget on the samples that cost least, so it is never above the robust accuracy."
            )
        )
    return Section("Distances", tuple(blocks))


def _by_attack(result: EvaluationResult) -> Chart:
    names = {CLEAN: "clean inputs"} | {f"{ROBUST}_{attack}": f"after {attack}" for attack in result.attacks}
    if len(result.attacks) > 1:
        names[ROBUST] = "worst case of all attacks"
    rows = [
        Bar(name, result.values[key], *result.intervals[key], BLUE if key == CLEAN else ORANGE)
        for key, name in names.items()
        if key in result.values
    ]
    return bars(
        "Accuracy left by attack",
        rows,
        "Attacks run in this order, each on what the ones before it left, unless they were run independently. Lines are Wilson 95% intervals.",
    )


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}"

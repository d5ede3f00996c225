"""The tables, from the records of all runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.shared.protocol import Protocol
from benchmarks.shared.statistics import Estimate, estimate, paired
from benchmarks.shared.variants import settings, variant_key

REFERENCES = ("pgd-at", "trades")
ABLATIONS = {
    "sat": "alp", "sat-label": "alp", "mmd": "alp", "coral": "alp", "sat-features": "alp-features",
    "class-transport": "alp-features", "critic": "alp-features", "udr": "pgd-at", "wrm": "pgd-at", "sinkhorn-dro": "standard", "feature-scattering": "pgd-at",
}  # fmt: skip
"""What each recipe is without its transport."""
OVERSTATED = 0.03
"""How much wider than that of ``pgd-at`` the gap between PGD and the stronger attack may be before it is marked."""
MEASURES = {"autoattack": "square", "apgd": "apgd-t"}
"""Measures that rank, the strongest first, and the stage after which each is known. PGD alone never ranks."""

NAMES = {"autoattack": "AutoAttack", "apgd": "APGD"}


class Row(NamedTuple):
    """A recipe with its settings, on all seeds."""

    label: str
    name: str
    settings: str
    runs: dict[int, dict[str, Any]]
    timing: dict[str, Any] | None
    diverged: int

    def accuracies(self, stage: str) -> dict[int, float]:
        return {seed: run["test"][stage]["accuracy"] for seed, run in self.runs.items() if stage in run["test"]}

    @property
    def strongest(self) -> str:
        """AutoAttack if all seeds have it: a mean over fewer would rank by which seeds they are."""
        return "autoattack" if len(self.accuracies(MEASURES["autoattack"])) == len(self.runs) else "apgd"

    @property
    def robust(self) -> Estimate:
        found = estimate(list(self.accuracies(MEASURES[self.strongest]).values()))
        assert found is not None
        return found

    def per_run(self, key: str) -> float:
        """Mean over seeds of a number of the training."""
        return statistics.mean(run["training"][key] for run in self.runs.values())


def rows(
    records: list[dict[str, Any]], timing: Mapping[str, dict[str, Any]], current: Callable[[str], str | None]
) -> list[Row]:
    """One row for each variant that was attacked on the test images, the most robust first.

    Args:
        records: of all runs.
        timing: of steps in turns, by the variants' keys.
        current: the key of what a label means now; runs under that label with other settings are told apart by them.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(variant_key(record), []).append(record)
    found = []
    for key, group in groups.items():
        runs = {run["seed"]: run for run in group if MEASURES["apgd"] in run.get("test", {}) and "label" in run}
        if not runs:
            continue
        first = next(iter(runs.values()))
        label = first["label"]
        if current(label) != key:
            label = f"{first['recipe']}{'+avg' * first['averaged']} ({settings(first)})"
        diverged = sum("diverged" in run["training"] for run in group if "training" in run)
        found.append(
            Row(label, first["recipe"], settings(first), dict(sorted(runs.items())), timing.get(key), diverged)
        )
    return sorted(found, key=lambda row: -row.robust.mean)


def lost(records: list[dict[str, Any]]) -> list[str]:
    """Variants of which runs diverged and none is left to show."""
    groups = {variant_key(run): f"{run['label']} ({settings(run)})" for run in records if "label" in run}
    kept = {variant_key(run) for run in records if "diverged" not in run.get("training", {})}
    return [text for key, text in groups.items() if key not in kept]


def difference(ours: Row, theirs: Row | None) -> tuple[Estimate, str] | None:
    """Paired by seed, under the strongest attack that has met both on all of their common seeds; and that attack's name."""
    found = {
        measure: pairs
        for measure, stage in MEASURES.items()
        if theirs is not None and (pairs := paired(ours.accuracies(stage), theirs.accuracies(stage)))
    }
    most = max((pairs.count for pairs in found.values()), default=0)
    return next(((pairs, measure) for measure, pairs in found.items() if pairs.count == most), None)


def gap(row: Row, measure: str) -> float | None:
    """How much more PGD leaves than the stronger attack, on the seeds that have it."""
    strong, pgd = row.accuracies(MEASURES[measure]), row.accuracies("pgd")
    return statistics.mean(pgd[seed] - strong[seed] for seed in strong) if strong else None


def overstates(row: Row, reference: Row | None) -> bool:
    for measure in MEASURES:
        ours, theirs = gap(row, measure), gap(reference, measure) if reference else None
        if ours is not None and theirs is not None:
            return ours - theirs >= OVERSTATED
    return False


def step_ratio(row: Row, reference: Row | None, device: str) -> tuple[float, str] | None:
    """Time of a step in multiples of the reference's, and in words."""
    if row.timing:
        low, high = row.timing["interval_95"]
        return row.timing["ratio"], f"{row.timing['ratio']:.2f} ({low:.2f} to {high:.2f})"
    if reference is None:
        return None
    key = "wall_step_ms" if device == "cuda" else "cpu_step_ms"
    ratio = row.per_run(key) / reference.per_run(key)
    return ratio, f"~{ratio:.2f}"


def by_label(found: list[Row]) -> dict[str, Row]:
    return {row.label: row for row in found}


def summary(found: list[Row], protocol: Protocol) -> list[dict[str, Any]]:
    """The numbers of the table, for the JSON."""
    labels = by_label(found)
    numbers = []
    for row in found:
        stages = {"clean": "clean", "pgd": "pgd"} | MEASURES
        accuracy = {name: estimate(list(row.accuracies(stage).values())) for name, stage in stages.items()}
        ratio = step_ratio(row, labels.get(REFERENCES[0]), protocol.device)
        numbers.append(
            {
                "label": row.label,
                "settings": row.settings,
                "seeds": list(row.runs),
                "diverged": row.diverged,
                **{name: value._asdict() if value else None for name, value in accuracy.items()},
                "ranked_by": row.strongest,
                **{f"minus_{name}": _difference(row, labels.get(name)) for name in REFERENCES},
                "train_wall_s": row.per_run("wall_s"),
                "train_cpu_s": row.per_run("cpu_s"),
                "step_ratio": ratio[0] if ratio else None,
                "pgd_overstates": overstates(row, labels.get(REFERENCES[0])),
            }
        )
    return numbers


def _difference(ours: Row, theirs: Row | None) -> dict[str, Any] | None:
    found = difference(ours, theirs)
    return found[0]._asdict() | {"measure": found[1]} if found else None


def markdown(found: list[Row], lost: list[str], protocol: Protocol, hardware: list[str]) -> str:
    """The whole report."""
    diverged = f"Diverged on every seed: {', '.join(lost)}.\n" if lost else ""
    if not found:
        return diverged or "No run has been finished yet.\n"
    labels = by_label(found)
    reference = labels.get(REFERENCES[0])
    header = [
        "recipe",
        "settings",
        "seeds",
        "clean",
        "PGD",
        "APGD",
        "AutoAttack",
        *(f"− {name}" for name in REFERENCES),
    ]
    lines = [[*header, "training, s", "step, × pgd-at", "notes"]]
    for row in found:
        percent = (estimate(list(row.accuracies(stage).values())) for stage in ("clean", "pgd", "apgd-t", "square"))
        against = [_against(row, labels.get(name)) for name in REFERENCES]
        ratio = step_ratio(row, reference, protocol.device)
        notes = ["PGD overstates"] * overstates(row, reference)
        notes += [f"{row.diverged} more diverged"] * bool(row.diverged)
        cells = [
            row.label,
            row.settings,
            str(len(row.runs)),
            *(_share(each, len(row.runs)) for each in percent),
            *against,
        ]
        seconds = row.per_run("wall_s" if protocol.device == "cuda" else "cpu_s")
        lines.append([*cells, f"{seconds:.1f}", ratio[1] if ratio else "–", ", ".join(notes)])
    text = f"{table(lines)}\n{_explanation(protocol)}\n"
    pairs = [(row, other) for row in found if (other := _ablation(row, labels))]
    if pairs:
        lines = [["recipe", "without its transport", "difference", "under", "seeds"]]
        for row, other in pairs:
            value, measure = difference(row, other) or (None, "")
            cells = [value.text(sign=True), NAMES[measure], str(value.count)] if value else ["–", "no common seed", "0"]
            lines.append([row.label, other.label, *cells])
        text += f"\n## What the transport adds\n\n{table(lines)}"
    return f"{text}\n{diverged}\nProtocol: {protocol}.\n\nMeasured on {'; '.join(hardware)}.\n"


def _share(found: Estimate | None, seeds: int) -> str:
    if found is None:
        return "–"
    return found.text() + (f" ({found.count} of the seeds)" if found.count < seeds else "")


def _ablation(row: Row, labels: Mapping[str, Row]) -> Row | None:
    """The same changes, if any, of the recipe without transport."""
    other = ABLATIONS.get(row.name)
    return labels.get(row.label.replace(row.name, other, 1)) if other else None


def _against(ours: Row, theirs: Row | None) -> str:
    found = None if ours is theirs else difference(ours, theirs)
    if found is None:
        return "–"
    value, measure = found
    return value.text(sign=True) + (f" ({NAMES[measure]})" if measure != ours.strongest else "")


def _explanation(protocol: Protocol) -> str:
    clock = "wall" if protocol.device == "cuda" else "the process's own"
    return (
        f"Accuracy in per cent of {protocol.test} test images, means over seeds ± half a 95% t-interval over seeds (none with one "
        f"seed). PGD: {protocol.pgd_steps} steps, {protocol.pgd_restarts} restarts. APGD: what APGD-CE and APGD-T ({protocol.attack_steps} "
        f"steps each) leave. AutoAttack: what FAB-T and Square ({protocol.queries} queries) leave of that. Ranked by AutoAttack "
        "where all seeds have it, else by APGD. `− pgd-at`, `− trades`: points, paired by seed, under the strongest attack that has met both on all common seeds. Training: seconds of "
        f"training steps alone ({clock}), without validation. Step: median of steps taken in turns, with a 95% bootstrap interval; "
        f"`~`: from the runs themselves. `PGD overstates`: PGD leaves at least {100 * OVERSTATED:.0f} points more above the strongest attack than it "
        "does for pgd-at."
    )


def table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

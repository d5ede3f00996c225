"""Which settings of each recipe are used: those most robust on the validation images."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.defenses.report import table
from benchmarks.defenses.runs import Bench
from benchmarks.shared.files import claimed, read, write_atomically, write_text
from benchmarks.shared.variants import Variant, candidates, settings


def tuning_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_tuning.json")


def choose(bench: Bench, variants: list[Variant], seeds: int, samples: int, stem: Path) -> str:
    """Write the best candidate of each recipe whose candidates are all done, beside what others wrote; return the table."""
    path, recipes = tuning_path(stem), {}
    for variant in variants:
        tried = [_tried(bench, candidate, seeds, samples) for candidate in candidates(variant, bench.protocol.threat)]
        if None not in tried:
            # A candidate that diverged on any seed has no accuracy, and is never chosen.
            best = max(tried, key=lambda each: (each["robust"] is not None, each["robust"], each["clean"]))
            recipes[variant.label] = {"chosen": best["changes"], "candidates": tried}
    common = {"protocol": asdict(bench.protocol), "samples": samples, "seeds": seeds}
    with claimed(bench.work / "tuning.lock", wait=True):
        old = read(path)
        same = all(old.get(key) == value for key, value in common.items())
        content = common | {"recipes": (old["recipes"] if same else {}) | recipes}
        write_atomically(path, content)
        text = _markdown(bench, content)
        write_text(path.with_suffix(".md"), text)
    return text


def tuned(variant: Variant, bench: Bench, stem: Path) -> Variant:
    """The variant with what was chosen for it, or else for its recipe's name; the preset, where nothing was tuned at all.

    Raises:
        ValueError: if others were tuned and this recipe was not, or under another protocol.
    """
    path = tuning_path(stem)
    content = read(path)
    if not content:
        return variant
    advice = f"Run the same command with --tune first, or compare presets with --no-tuned ({path})."
    if content["protocol"] != asdict(bench.protocol):
        raise ValueError(f"The recipes were tuned under another protocol. {advice}")
    for label in (variant.label, variant.name):
        if label in content["recipes"]:
            return variant.with_changes(content["recipes"][label]["chosen"])
    raise ValueError(f"{variant.label!r} was not tuned, others were. {advice}")


def _tried(bench: Bench, variant: Variant, seeds: int, samples: int) -> dict[str, Any] | None:
    """How a candidate did; ``None`` if it is not finished."""
    records = [bench.run(variant, seed).record for seed in range(seeds)]
    found: dict[str, Any] = {"changes": dict(variant.changes), "robust": None, "clean": None}
    if any("diverged" in record.get("training", {}) for record in records):
        return found | {"diverged": True}
    results = [record.get("tuning", {}).get(str(samples)) for record in records]
    if None in results:
        return None
    return found | {
        "robust": statistics.mean(result["accuracy"] for result in results),
        "clean": statistics.mean(result["clean"] for result in results),
    }


def _markdown(bench: Bench, content: dict[str, Any]) -> str:
    lines = [["recipe", "settings", "clean", "robust", ""]]
    for label, recipe in content["recipes"].items():
        for tried in recipe["candidates"]:
            shares = [
                f"{100 * tried[key]:.1f}" if tried[key] is not None else "diverged" for key in ("clean", "robust")
            ]
            lines.append([label, settings(tried), *shares, "chosen" if tried["changes"] == recipe["chosen"] else ""])
    samples = min(content["samples"], bench.protocol.validation)
    return (
        f"# Settings of each recipe, chosen on {samples} validation images\n\nPer cent that APGD-CE and APGD-T "
        f"({bench.protocol.attack_steps} steps each) leave, {content['seeds']} seed{'s' * (content['seeds'] > 1)}.\n\n"
        f"{table(lines)}\nProtocol: {bench.protocol}.\n"
    )

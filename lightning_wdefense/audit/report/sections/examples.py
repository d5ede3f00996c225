"""The least and the most robust samples, as pictures or as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_wdefense.audit.report.pages.images import images_of, is_image
from lightning_wdefense.audit.report.pages.page import Block, Gallery, Picture, Section, Table, Text
from lightning_wdefense.audit.report.sections.classes import named
from lightning_wdefense.evaluation.details.examples import Example
from lightning_wdefense.evaluation.result import EvaluationResult


def example_section(result: EvaluationResult, names: Sequence[str]) -> Section | None:
    """What the least and the most robust samples look like, if they were kept."""
    if result.examples is None or not (result.examples.least or result.examples.most):
        return None
    order = (
        "by their distance to the decision boundary"
        if "distance" in result.samples
        else "by the attack that broke them, those that fell to the first attack first, and then by the margin of their logits under attack"
    )
    blocks: list[Block] = [Text(f"Of the samples that are right on their clean input, ordered {order}.", note=True)]
    groups = {"Least robust": result.examples.least, "Most robust": result.examples.most}
    everything = [example for group in groups.values() for example in group]
    if all(is_image(example.inputs) for example in everything):
        for title, group in groups.items():
            if group:
                pictures = (Picture(images_of(each, result.threat), _caption(each, result, names)) for each in group)
                blocks.append(Gallery(title, tuple(pictures)))
    else:
        shape = tuple(everything[0].inputs.shape)
        blocks.append(Text(f"The inputs, of shape {shape}, are no images, so there are no pictures."))
        rows = [(title, *_row(each, result, names)) for title, group in groups.items() for each in group]
        head = ("", "Sample", "Label", "Under attack", "Broken by", "Largest change", "Distance")
        blocks.append(Table(head, rows, numbers=False))
    return Section("Least and most robust samples", tuple(blocks))


def _caption(example: Example, result: EvaluationResult, names: Sequence[str]) -> str:
    label = f"Sample {example.sample}, label {named(example.label, names)}"
    fell = (
        "withstood all attacks"
        if example.broken_by < 0
        else f"taken for {named(example.adversarial, names)} ({result.attacks[example.broken_by]})"
    )
    return f"{label}: {fell}{_distance(example)}."


def _distance(example: Example) -> str:
    if math.isnan(example.distance):
        return ""
    return ", no boundary found" if math.isinf(example.distance) else f", distance {example.distance:.3g}"


def _row(example: Example, result: EvaluationResult, names: Sequence[str]) -> tuple[str, ...]:
    broken_by = "none" if example.broken_by < 0 else result.attacks[example.broken_by]
    change = f"{float((example.attacked - example.inputs).abs().max()):.3g}"
    distance = "–" if math.isnan(example.distance) else f"{example.distance:.3g}"
    return (
        str(example.sample),
        named(example.label, names),
        named(example.adversarial, names),
        broken_by,
        change,
        distance,
    )

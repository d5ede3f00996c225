"""Charts: where their marks stand, and what happens to what does not fit."""

from __future__ import annotations

import math
import re

import pytest
import torch
from audit.report.test_html import Checked

from lightning_wdefense import EvaluationResult, ThreatModel
from lightning_wdefense.audit.report.pages.charts.bars import Bar, bars, histogram
from lightning_wdefense.audit.report.pages.charts.curves import Curve, curves
from lightning_wdefense.audit.report.pages.charts.drawing import CHARACTER, WIDTH, shortened, ticks
from lightning_wdefense.audit.report.pages.charts.heat_map import heat_map
from lightning_wdefense.audit.report.pages.page import Chart, Table
from lightning_wdefense.audit.report.sections.classes import class_section


def widths(chart: Chart, colour: int) -> list[float]:
    return [float(width) for width in re.findall(rf'<g class="c{colour}"><rect [^>]*width="([\d.]+)"', chart.svg)]


def test_bars_are_as_long_as_their_shares():
    chart = bars(
        "title",
        [Bar("one", 0.25, 0.2, 0.3, 0), Bar("<two>", 1.0, 0.9, 1.0, 1), Bar("none", math.nan, math.nan, math.nan, 2)],
    )
    assert widths(chart, 0) == [0.25 * WIDTH]
    assert widths(chart, 1) == [WIDTH]
    assert widths(chart, 2) == []
    assert chart.table.rows == [
        ("one", "25.0%", "20.0 to 30.0%"),
        ("<two>", "100.0%", "90.0 to 100.0%"),
        ("none", "unknown", "–"),
    ]
    assert "&lt;two&gt;" in chart.svg
    Checked(chart.svg)


@pytest.mark.parametrize("mark", [0.0, 0.1, 0.35, 2.0, 1e-4])
def test_histogram_counts_everything_and_splits_at_the_mark(mark):
    values = torch.rand(500, generator=torch.Generator().manual_seed(0))
    chart = histogram("title", values, mark, "eps", "distance")
    assert sum(int(count) for _, count in chart.table.rows) == 500
    edges = [float(name.split(" to ")[0]) for name, _ in chart.table.rows]
    assert len(edges) <= 48
    if mark >= 0.1:  # a mark below a bin cannot stand between two
        below = sum(int(count) for (_, count), edge in zip(chart.table.rows, edges, strict=True) if edge < mark * 0.999)
        assert below == int((values <= mark).sum())
    Checked(chart.svg)


@pytest.mark.parametrize("largest", [0.1, 0.25, 0.2499, 0.3, 1.25, 12.5, 100.0])
def test_numbers_on_axes_are_inside_of_the_drawing(largest):
    ends = [(0.0, 1.0)] * 2
    for chart in (
        histogram("title", torch.tensor([largest]), largest / 2, "a long name of a mark", "distance"),
        curves("title", [Curve("a", [0, largest], [1, 0.5], ends)], "eps", largest, "a long name of a mark"),
    ):
        for x, anchor, words in re.findall(
            r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)"[^>]*>([^<]*)<', chart.svg
        ):
            start = float(x) - {"start": 0, "middle": 0.5, "end": 1}[anchor] * len(words) * CHARACTER
            assert start >= -1
            assert start + len(words) * CHARACTER <= WIDTH + 1


def test_curves_go_through_their_points():
    chart = curves(
        "title", [Curve("one", [0, 0.5, 1], [1, 0.5, 0], [(0.9, 1), (0.4, 0.6), (0, 0.1)])], "eps", 0.5, "eps 0.5"
    )
    points = [
        tuple(map(float, pair.split())) for pair in re.search(r'd="M([^"Z]*)" class="line', chart.svg)[1].split("L")
    ]
    (left, top), (middle, half), (right, bottom) = points
    assert (left + right) / 2 == pytest.approx(middle)
    assert (top + bottom) / 2 == pytest.approx(half)
    assert chart.svg.count("<text") == 5 + len(ticks(1.0)) + 2  # without a legend
    assert chart.table.rows[1] == ("0.5", "50.0%", "40.0 to 60.0%")


def test_curves_of_several_places_share_a_table():
    ends = [(0.0, 1.0)] * 2
    chart = curves("title", [Curve("a", [0, 0.1], [1, 0.5], ends), Curve("b", [0, 0.2], [0.9, math.nan], ends)], "eps")
    assert chart.table == Table(
        ("eps", "a", "b"), [("0", "100.0%", "90.0%"), ("0.1", "50.0%", "–"), ("0.2", "–", "unknown")]
    )
    assert "nan" not in chart.svg


def test_heat_maps_show_percent():
    chart = heat_map("title", torch.tensor([[0.996, 0.004], [0.0, 1.0]]), ["cat", "<dog>"], "label", "prediction")
    words = "".join(Checked(chart.svg).text)
    assert "<dog>" in words
    assert "<1" in words
    assert chart.table.rows[0] == ("cat", "99.6", "0.4")


@pytest.mark.parametrize("high", [1e-5, 0.031, 0.1, 1, 7, 43, 999])
def test_ticks_are_few_and_round(high):
    found = ticks(high)
    assert found[0] == 0
    assert 3 <= len(found) <= 7
    assert found[-1] <= high * (1 + 1e-9)
    assert all(len(f"{tick:g}".replace("0", "").replace(".", "").split("e")[0]) <= 2 for tick in found)


def test_names_are_shortened():
    assert shortened("short", 100) == "short"
    assert shortened("a very long name", 50) == "a very…"


def test_of_many_classes_the_least_robust_are_shown():
    labels = torch.arange(50).repeat_interleave(2)
    right = (labels >= 20).float()
    samples = {
        "label": labels,
        "clean": labels,
        "worst": torch.where(right > 0, labels, 49),
        "clean_right": torch.ones(100),
        "robust_right": right,
        "broken_by": torch.where(right > 0, -1, 0),
    }
    result = EvaluationResult({"clean_acc": 1.0, "robust_acc": 0.6}, samples, ThreatModel(), ("pgd",))
    section = class_section(result, [f"a long name of a class, number {label}" for label in range(50)])
    table, note, confusion = section.blocks
    assert [row[0].split(":")[0] for row in table.rows] == [str(label) for label in range(20)]
    assert "20 least robust of 50" in note.text
    assert confusion.table.head[1:] == tuple(map(str, range(20)))

"""Bars of shares with their intervals, and histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_wdefense.audit.report.pages.charts.drawing import WIDTH, beside, box, line, shortened, svg, text, ticks
from lightning_wdefense.audit.report.pages.page import Chart, Table

ROW, VALUE = 42.0, 150.0
"""Height of a bar with its name above it, and the width kept for its number."""

BINS, MOST_BINS = 24, 48

LEFT, RIGHT, TOP, HEIGHT, BOTTOM = 34.0, 10.0, 24.0, 170.0, 42.0
"""Margins and height of a histogram."""


class Bar(NamedTuple):
    """A share with its interval, all in [0, 1].

    Attributes:
        name: what it is the share of.
        share: the share, which may be NaN.
        low: lower end of the interval.
        high: upper end.
        colour: number of the colour.
    """

    name: str
    share: float
    low: float
    high: float
    colour: int


def bars(title: str, rows: Sequence[Bar], caption: str = "") -> Chart:
    """Horizontal bars, with the name above each, so that names of any length fit."""
    parts = []
    for index, row in enumerate(rows):
        y = ROW * index + 14
        parts.append(text(0, y, shortened(row.name, WIDTH - VALUE)))
        parts.append(text(WIDTH, y, _with_interval(row), anchor="end"))
        parts.append(box(0, y + 6, WIDTH, 12, "fill grid", 0.12))
        if not math.isnan(row.share):
            parts.append(f'<g class="c{row.colour}">{box(0, y + 6, WIDTH * row.share, 12, "fill")}</g>')
        if not math.isnan(row.low):
            low, high, middle = WIDTH * row.low, WIDTH * row.high, y + 12
            ends = (line(x, middle - 4, x, middle + 4, "whisker") for x in (max(low, 0.7), min(high, WIDTH - 0.7)))
            parts += [line(low, middle, high, middle, "whisker"), *ends]
    table = Table(
        ("", "Accuracy", "95% interval"), [(row.name, percent(row.share), interval(row.low, row.high)) for row in rows]
    )
    return Chart(title, svg(ROW * len(rows) - 6, parts, title), table, caption)


def histogram(title: str, values: Tensor, mark: float, mark_name: str, xlabel: str, caption: str = "") -> Chart:
    """How often values ``(N,)`` from 0 up occur: those up to ``mark`` in one colour, those above it in another."""
    bins, high = _bins(float(values.max()) if len(values) else 0.0, mark)
    counts = torch.histc(values.double(), bins, 0, high).long().tolist()
    tallest, width, bottom = max(max(counts), 1), WIDTH - LEFT - RIGHT, TOP + HEIGHT
    parts = []
    for tick in ticks(tallest, 4):
        y = bottom - HEIGHT * tick / tallest
        if tick == int(tick):
            parts += [
                line(LEFT, y, WIDTH - RIGHT, y, "grid"),
                text(LEFT - 6, y + 4, f"{tick:g}", anchor="end", kind="soft"),
            ]
    edges = [high * index / bins for index in range(bins + 1)]
    for index, count in enumerate(counts):
        height, colour = HEIGHT * count / tallest, 1 if edges[index + 1] <= mark * (1 + 1e-9) else 0
        field = box(LEFT + width * index / bins + 0.5, bottom - height, width / bins - 1, height, "fill")
        parts.append(f'<g class="c{colour}">{field}</g>')
    for tick in ticks(high):
        parts.append(beside(LEFT + width * tick / high, bottom + 16, f"{tick:g}"))
    x = LEFT + width * mark / high
    parts += [
        line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"),
        line(x, TOP - 6, x, bottom, "axis dash2"),
        beside(x, TOP - 9, mark_name),
        text(LEFT + width / 2, bottom + 36, xlabel, anchor="middle", kind="soft"),
    ]
    rows = [(f"{low:.4g} to {up:.4g}", f"{count}") for low, up, count in zip(edges, edges[1:], counts, strict=False)]
    return Chart(title, svg(bottom + BOTTOM, parts, title), Table((xlabel, "Samples"), rows), caption)


def _bins(largest: float, mark: float) -> tuple[int, float]:
    """Number of bins, and where the last one ends: past the largest value and the mark, with the mark between two bins."""
    high = max(largest, mark) or 1.0
    below = max(1, round(BINS * mark / high))
    bins = math.ceil(high * (1 + 1e-9) / (mark / below)) if mark > 0 else MOST_BINS + 1
    return (bins, bins * mark / below) if bins <= MOST_BINS else (BINS, high)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage; ``"unknown"`` if it is NaN."""
    return "unknown" if math.isnan(share) else f"{100 * share:.{digits}f}%"


def interval(low: float, high: float) -> str:
    """An interval of shares as percentages; a dash if it is NaN."""
    return "–" if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}%"


def _with_interval(row: Bar) -> str:
    return percent(row.share) + ("" if math.isnan(row.low) else f" ({interval(row.low, row.high)})")

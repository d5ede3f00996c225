"""Curves of accuracy by eps, with bands for their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_wdefense.audit.report.pages.charts.bars import interval, percent
from lightning_wdefense.audit.report.pages.charts.drawing import (
    COLOURS,
    DASHES,
    WIDTH,
    beside,
    line,
    path,
    shortened,
    svg,
    text,
    ticks,
)
from lightning_wdefense.audit.report.pages.page import Chart, Table

LEFT, RIGHT, TOP, HEIGHT, BOTTOM, LEGEND = 44.0, 12.0, 24.0, 220.0, 44.0, 20.0
"""Margins and height of the field, and height of a line of the legend."""


class Curve(NamedTuple):
    """A curve of shares in [0, 1], with its intervals.

    Attributes:
        name: its name in the legend.
        x: places, increasing from 0.
        y: shares.
        ends: their intervals.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ends: Sequence[tuple[float, float]]


def curves(
    title: str, drawn: Sequence[Curve], xlabel: str, mark: float | None = None, mark_name: str = "", caption: str = ""
) -> Chart:
    """Accuracy by eps; with ``mark``, a line at the eps of the threat model. A legend only if there are several curves."""
    high = max((max(curve.x) for curve in drawn), default=1.0) or 1.0
    width = WIDTH - LEFT - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + width * x / high, TOP + HEIGHT * (1 - y)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(0, share)[1]
        parts += [
            line(LEFT, y, WIDTH - RIGHT, y, "grid"),
            text(LEFT - 6, y + 4, f"{share:.0%}", anchor="end", kind="soft"),
        ]
    for tick in ticks(high):
        parts.append(beside(place(tick, 0)[0], TOP + HEIGHT + 16, f"{tick:g}"))
    if mark is not None and mark <= high:
        x = place(mark, 0)[0]
        parts.append(line(x, TOP - 6, x, TOP + HEIGHT, "axis dash2"))
        parts.append(beside(x, TOP - 9, mark_name))
    for index, curve in enumerate(drawn):
        parts.append(f'<g class="c{index % COLOURS}">{_drawn(curve, place, f"line dash{index % DASHES}")}</g>')
    parts.append(line(LEFT, TOP + HEIGHT, WIDTH - RIGHT, TOP + HEIGHT, "axis"))
    parts.append(text(LEFT + width / 2, TOP + HEIGHT + 36, xlabel, anchor="middle", kind="soft"))
    bottom = TOP + HEIGHT + BOTTOM
    if len(drawn) > 1:
        for index, curve in enumerate(drawn):
            y = bottom + LEGEND * index + 12
            sample = path([(LEFT, y - 4), (LEFT + 30, y - 4)], f"line dash{index % DASHES}")
            parts.append(f'<g class="c{index % COLOURS}">{sample}</g>')
            parts.append(text(LEFT + 38, y, shortened(curve.name, width - 38)))
        bottom += LEGEND * len(drawn) + 4
    return Chart(title, svg(bottom, parts, title), _table(drawn), caption)


def _drawn(curve: Curve, place: object, kind: str) -> str:
    assert callable(place)
    known = [(x, y, *ends) for x, y, ends in zip(curve.x, curve.y, curve.ends, strict=True) if not math.isnan(y)]
    if not known:
        return ""
    sides = [place(x, low) for x, _, low, _ in known] + [place(x, up) for x, _, _, up in reversed(known)]
    band = "" if any(math.isnan(low) for _, _, low, _ in known) else path(sides, "band", closed=True)
    return band + path([place(x, y) for x, y, _, _ in known], kind)


def _table(drawn: Sequence[Curve]) -> Table:
    if len(drawn) == 1:
        (curve,) = drawn
        cells = zip(curve.x, curve.y, curve.ends, strict=True)
        return Table(
            ("eps", "Accuracy", "95% interval"), [(f"{x:.4g}", percent(y), interval(*ends)) for x, y, ends in cells]
        )
    # Curves may be measured at different places.
    places = sorted({x for curve in drawn for x in curve.x})
    shares = [dict(zip(curve.x, curve.y, strict=True)) for curve in drawn]
    rows = [(f"{x:.4g}", *(percent(found[x]) if x in found else "–" for found in shares)) for x in places]
    return Table(("eps", *(curve.name for curve in drawn)), rows)

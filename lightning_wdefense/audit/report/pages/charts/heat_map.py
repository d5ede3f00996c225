"""A square matrix of shares as coloured cells."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_wdefense.audit.report.pages.charts.drawing import CHARACTER, WIDTH, box, shortened, svg, text
from lightning_wdefense.audit.report.pages.page import Chart, Table

NUMBERED = 12
"""Largest number of classes whose cells have room for a number."""

NAME = 80.0
"""Largest width of the name of a class."""

FAINTEST, STRONGEST = 0.05, 0.65
"""Opacity of the cells of shares 0 and 1, on which numbers stay readable."""

SIDE = 18.0
"""Width of the name of an axis."""


def heat_map(
    title: str, shares: Tensor, names: Sequence[str], rows_are: str, columns_are: str, caption: str = ""
) -> Chart:
    """Shares ``(K, K)`` in [0, 1] as cells: the diagonal in one colour, what lies beside it in another, with percentages if they fit."""
    count = len(names)
    short = [shortened(name, NAME) for name in names]
    longest = max((len(name) for name in short), default=1) * CHARACTER + 8
    left, cell = SIDE + longest, (WIDTH - SIDE - longest) / max(count, 1)
    upright = longest - 8 <= cell
    top = SIDE + (16 if upright else longest)
    parts = [
        text(left + cell * count / 2, 12, columns_are, anchor="middle", kind="soft"),
        text(12, top + cell * count / 2, rows_are, anchor="middle", kind="soft", turn=-90),
    ]
    for row, values in enumerate(shares.tolist()):
        middle = top + cell * (row + 0.5)
        parts.append(text(left - 6, middle + 4, short[row], anchor="end"))
        x = left + cell * (row + 0.5)
        parts.append(
            text(x, top - 6, short[row], anchor="middle") if upright else text(x + 4, top - 6, short[row], turn=-90)
        )
        for column, share in enumerate(values):
            parts.append(_cell(left + cell * column, top + cell * row, cell, share, 0 if row == column else 1, count))
    table = Table(
        (f"{rows_are} \\ {columns_are}", *names),
        [
            (name, *(f"{100 * share:.1f}" for share in values))
            for name, values in zip(names, shares.tolist(), strict=True)
        ],
    )
    return Chart(title, svg(top + cell * count + 2, parts, title), table, caption)


def _cell(x: float, y: float, size: float, share: float, colour: int, count: int) -> str:
    field = box(x + 0.5, y + 0.5, size - 1, size - 1, "fill", FAINTEST + (STRONGEST - FAINTEST) * share)
    words = "" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}"
    number = text(x + size / 2, y + size / 2 + 4, words, anchor="middle", kind="small") if words else ""
    return f'<g class="c{colour}">{field}{number if count <= NUMBERED else ""}</g>'

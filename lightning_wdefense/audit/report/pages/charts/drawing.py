"""Elements of an SVG drawing, and the numbers on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

WIDTH = 400.0
"""Width of all drawings in pixels. A phone shows them at nearly this size, so that their text stays readable."""

CHARACTER = 6.8
"""Width of a character of 12 pixels, about."""

COLOURS, DASHES = 5, 4
"""Number of colours and of patterns of lines in the style sheet."""


def svg(height: float, parts: Iterable[str], title: str) -> str:
    """A drawing of this height with a title that screen readers say."""
    drawn = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img"><title>{escape(title)}</title>{drawn}</svg>'


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turn: float = 0) -> str:
    """Words at a place; the anchor is ``"start"``, ``"middle"`` or ``"end"``, and ``turn`` an angle in degrees."""
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    styled = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{styled}{turned}>{escape(words)}</text>'


def beside(x: float, y: float, words: str) -> str:
    """Words above or below ``x``, moved to the side at the edge of the drawing."""
    half = len(words) * CHARACTER / 2
    return text(min(max(x, half), WIDTH - half), y, words, anchor="middle", kind="soft")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, opacity: float = 1.0) -> str:
    """A filled rectangle."""
    faint = "" if opacity == 1 else f' fill-opacity="{opacity:.3f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{kind}"{faint}/>'


def path(points: Iterable[tuple[float, float]], kind: str, *, closed: bool = False) -> str:
    """A line through points."""
    places = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{places}{"Z" if closed else ""}" class="{kind}"/>'


def shortened(words: str, width: float) -> str:
    """Words that fit into a width (pixels), with an ellipsis for what does not."""
    most = max(1, int(width / CHARACTER))
    return words if len(words) <= most else words[: most - 1] + "…"


def ticks(high: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to ``high``, at most ``most`` steps."""
    if not (math.isfinite(high) and high > 0):
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if high / (power * factor) <= most)
    return [step * index for index in range(int(high / step + 1e-9) + 1)]

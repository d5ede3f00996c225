"""What a page holds, whatever it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "fair", "bad", "plain"]
"""How a word is coloured: good, to be looked at, bad, or not at all."""


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: plain text.
        note: whether it is a remark, in smaller type.
    """

    text: str
    note: bool = False


@dataclass(frozen=True)
class Mark:
    """A word with a colour, such as a verdict."""

    word: str
    tone: Tone


Cell = str | Mark


@dataclass(frozen=True)
class Table:
    """A table. All but the first column are aligned to the right if they are numbers.

    Attributes:
        head: names of the columns.
        rows: the cells, a row each.
        numbers: whether the columns after the first hold numbers.
    """

    head: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    numbers: bool = True


@dataclass(frozen=True)
class Figures:
    """A few large numbers, each with its name and a line below it."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Chart:
    """A drawing, and the same as a table for those who cannot see it.

    Attributes:
        title: what it shows.
        svg: the drawing, an ``<svg>`` element.
        table: its numbers.
        caption: how to read it.
    """

    title: str
    svg: str
    table: Table
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """One or several images side by side, as PNG files.

    Attributes:
        images: the PNG files, each with the word below it.
        caption: what they show.
    """

    images: tuple[tuple[bytes, str], ...]
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures under one title."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Remark:
    """A verdict with a title, what was found, what it means, and what to do."""

    verdict: Mark
    title: str
    figure: str
    meaning: str
    advice: str


Block = Text | Table | Figures | Chart | Gallery | Remark


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: its title.
        mark: a verdict beside the title, if there is one.
        lead: the line below the title.
        opening: what stands before the first section.
        sections: its parts.
    """

    title: str
    mark: Mark | None
    lead: str
    opening: tuple[Block, ...]
    sections: tuple[Section, ...]

"""A page in Markdown. Charts become tables, and pictures their captions."""

from __future__ import annotations

import re
from functools import singledispatch

from lightning_wdefense.audit.report.pages.page import (
    Block,
    Cell,
    Chart,
    Figures,
    Gallery,
    Mark,
    Page,
    Remark,
    Table,
    Text,
)


def markdown(page: Page) -> str:
    """The page as a Markdown document."""
    title = f"# {_escaped(page.title)}" + ("" if page.mark is None else f" ({_escaped(page.mark.word)})")
    parts = [title, _escaped(page.lead), *map(_block, page.opening)]
    for section in page.sections:
        parts += [f"## {_escaped(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"There is no Markdown for a {type(block).__name__}.")


@_block.register
def _(block: Text) -> str:
    return _escaped(block.text)


@_block.register
def _(block: Table) -> str:
    align = "---:" if block.numbers else "---"
    rows = [block.head, ("---", *[align] * (len(block.head) - 1)), *block.rows]
    lines = [" | ".join(cell if index == 1 else _cell(cell) for cell in row) for index, row in enumerate(rows)]  # type: ignore[misc]
    return "\n".join(f"| {line} |" for line in lines)


@_block.register
def _(block: Figures) -> str:
    return "\n".join(
        f"- **{_escaped(name)}**: {_escaped(value)} ({_escaped(note)})" for name, value, note in block.items
    )


@_block.register
def _(block: Chart) -> str:
    parts = (f"**{_escaped(block.title)}.** {_escaped(block.caption)}".strip(), _block(block.table))
    return "\n\n".join(parts)


@_block.register
def _(block: Gallery) -> str:
    lines = [f"- {_escaped(picture.caption)}" for picture in block.pictures]
    return "\n".join([f"**{_escaped(block.title)}** (pictures in report.html)", "", *lines])


@_block.register
def _(block: Remark) -> str:
    text = " ".join(_escaped(part) for part in (block.figure, block.meaning, block.advice) if part)
    return f"- **{_escaped(block.title)}** ({block.verdict.word}): {text}"


def _cell(cell: Cell) -> str:
    return _escaped(cell.word if isinstance(cell, Mark) else cell)


def _escaped(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))

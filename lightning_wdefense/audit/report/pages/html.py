"""A page as one HTML file: styles, drawings and pictures are inside, and no script."""

from __future__ import annotations

import base64
from functools import singledispatch
from html import escape
from importlib.resources import files

from lightning_wdefense.audit.report.pages.page import (
    Block,
    Cell,
    Chart,
    Figures,
    Gallery,
    Mark,
    Page,
    Picture,
    Remark,
    Section,
    Table,
    Text,
)

LONG_NAME = 16
"""Number of characters from which the names of rows keep a width on small screens."""

DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}{mark}</h1>
<p class="lead">{lead}</p>
</header>
<main>
{opening}
{contents}
{sections}
</main>
</body>
</html>
"""


def html(page: Page) -> str:
    """The page as an HTML document. All text of the page is escaped."""
    names = {f"s{index}": section for index, section in enumerate(page.sections, 1)}
    links = "".join(f'<a href="#{name}">{escape(section.title)}</a> ' for name, section in names.items())
    return DOCUMENT.format(
        title=escape(page.title),
        mark="" if page.mark is None else f" {_mark(page.mark)}",
        lead=escape(page.lead),
        style=files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
        opening="\n".join(map(_block, page.opening)),
        contents=f'<nav aria-label="Contents">{links}</nav>' if links else "",
        sections="\n".join(_section(name, section) for name, section in names.items()),
    )


def _section(name: str, section: Section) -> str:
    """Charts that follow each other stand side by side where there is room."""
    parts, charts = [], False
    for block in section.blocks:
        if isinstance(block, Chart) != charts:
            charts = not charts
            parts.append('<div class="charts">' if charts else "</div>")
        parts.append(_block(block))
    if charts:
        parts.append("</div>")
    return f'<section id="{name}">\n<h2>{escape(section.title)}</h2>\n' + "\n".join(parts) + "\n</section>"


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"There is no HTML for a {type(block).__name__}.")


@_block.register
def _(block: Text) -> str:
    return f"<p{' class=note' if block.note else ''}>{escape(block.text)}</p>"


@_block.register
def _(block: Table) -> str:
    longest = max((len(_cell(row[0])) for row in block.rows), default=0)
    kinds = ["numbers"] * block.numbers + ["named"] * (longest > LONG_NAME)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.head)
    rows = "\n".join(
        f'<tr><th scope="row">{_cell(row[0])}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in block.rows
    )
    # A focus lets the keyboard scroll a table that is too wide.
    return f'<div class="table" tabindex="0"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


@_block.register
def _(block: Figures) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class=note>{escape(note)}</dd></div>"
        for name, value, note in block.items
    )
    return f'<dl class="figures">{items}</dl>'


@_block.register
def _(block: Chart) -> str:
    caption = f"<p class=note>{escape(block.caption)}</p>" if block.caption else ""
    numbers = f"<details><summary>Numbers</summary>{_block(block.table)}</details>"
    return f"<figure><figcaption>{escape(block.title)}</figcaption>\n{block.svg}\n{caption}{numbers}</figure>"


@_block.register
def _(block: Gallery) -> str:
    pictures = "\n".join(map(_picture, block.pictures))
    return f'<h3>{escape(block.title)}</h3>\n<div class="gallery">\n{pictures}\n</div>'


def _picture(picture: Picture) -> str:
    images = "".join(
        f'<div><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(word)}">'
        f"<span>{escape(word)}</span></div>"
        for png, word in picture.images
    )
    return f'<figure class="picture"><div class="images">{images}</div><p>{escape(picture.caption)}</p></figure>'


@_block.register
def _(block: Remark) -> str:
    advice = f"<p><strong>What to do:</strong> {escape(block.advice)}</p>" if block.advice else ""
    return (
        f'<div class="remark {block.verdict.tone}"><h3>{_mark(block.verdict)} {escape(block.title)}</h3>\n'
        f"<p><strong>{escape(block.figure)}</strong> {escape(block.meaning)}</p>{advice}</div>"
    )


def _cell(cell: Cell) -> str:
    return _mark(cell) if isinstance(cell, Mark) else escape(cell)


def _mark(mark: Mark) -> str:
    return f'<span class="mark {mark.tone}">{escape(mark.word)}</span>'

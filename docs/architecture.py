"""Draws the architecture from the package's imports: ``python docs/architecture.py``.

It writes ``docs/img/architecture.svg`` and the table of ``docs/architecture.md``. Nothing is imported: the files are parsed. The same
files give the same picture, so that a test can tell whether it is up to date.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_wdefense"
PICTURE = ROOT / "docs" / "img" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"

HELPERS = "_*.py"
LAYERS = (
    "__init__.py", "cli", "mixin.py", "callbacks", "audit", "evaluation", "defenses", "detection", "metrics", "attacks", "modules", "transport", HELPERS,
)  # fmt: skip
"""The rooms of the package from top to bottom: imports point down only. A new room takes its place here."""

HELPERS_SUMMARY = "Private helpers of several rooms: versions, seeds, locks, dtypes and names. They import no room."

Imports = dict[str, set[str]]
"""Which files of a package each of its files imports, as paths inside the package such as ``attacks/base.py``."""


def imports(package: Path) -> Imports:
    """What every file of a package imports of the package, at any place of the file.

    ``from package.room import name`` is an import of the module ``name`` if there is one, and of ``room/__init__.py`` if not.
    """
    files = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
    return {
        name: {
            found
            for node in ast.walk(ast.parse(path.read_text()))
            for module in _modules(node, package.name, name)
            if (found := _file(module, files)) is not None
        }
        - {name}
        for name, path in files.items()
    }


def _modules(node: ast.AST, package: str, file: str) -> list[list[str]]:
    """The modules that a statement in a file imports of the package, as lists of names below it."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return [parts[1:] for parts in names if parts[0] == package]
    if isinstance(node, ast.ImportFrom):
        parts = node.module.split(".") if node.module else []
        if node.level:
            parts = [package, *file.split("/")[: -node.level], *parts]
        return [[*parts[1:], alias.name] for alias in node.names] if parts[:1] == [package] else []
    return []


def _file(module: list[str], files: dict[str, Path]) -> str | None:
    """The file of a module, or of the one that it is a name in."""
    for parts in (module, module[:-1]):
        for name in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if name in files:
                return name
    return None


def room(file: str) -> str:
    """The room of a file: its folder, or one of the few files at the top."""
    first = file.split("/")[0]
    return HELPERS if re.fullmatch(r"_[a-z]\w*\.py", first) else first


def arrows(graph: Imports) -> dict[str, list[str]]:
    """Which rooms each room imports, from top to bottom."""
    found: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for file, others in graph.items():
        found[room(file)] |= {room(other) for other in others} - {room(file)}
    return {layer: sorted(found[layer], key=LAYERS.index) for layer in LAYERS}


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring, or of its folder's."""
    text = ast.get_docstring(ast.parse((path / "__init__.py" if path.is_dir() else path).read_text())) or ""
    text = re.sub(r":\w+:`~?([^`]*)`", r"``\1``", " ".join(text.split("\n\n")[0].split()))
    return text if text.endswith(".") else text + "."


def folders(path: Path) -> list[Path]:
    """The folders of Python files below a room, each before those that it holds."""
    return [each.parent for each in sorted(path.rglob("__init__.py")) if each.parent != path]


def size(path: Path) -> int:
    """Number of files in a folder itself."""
    return sum(each.is_file() for each in path.iterdir())


def title(layer: str) -> str:
    """How a room is called."""
    return {"__init__.py": PACKAGE.name}.get(layer, layer + "/" * (PACKAGE / layer).is_dir())


def description(layer: str) -> str:
    """What a room is for."""
    return HELPERS_SUMMARY if layer == HELPERS else summary(PACKAGE / layer)


# The picture: rooms from top to bottom on the left, and on the right a line for each room that is imported, from its highest importer
# down to it. A dot is an import. Lengths are in pixels.
LEFT, WIDTH, TOP, GAP = 20, 700, 66, 12
CHANNEL = 26
"""Distance between two lines."""
COLOURS = ("#4e79a7", "#b07aa1", "#d37295", "#e15759", "#f28e2b", "#c9a227", "#59a14f", "#3d8b8b", "#7f7f7f")
FONT = "font-family='Helvetica, Arial, sans-serif'"


def picture() -> str:
    """The architecture as SVG."""
    wanted = arrows(imports(PACKAGE))
    places, shapes, y = {}, [], TOP
    for layer in LAYERS:
        room_shapes, height = _box(layer, y)
        places[layer] = y, height
        shapes += room_shapes
        y += height + GAP
    right = LEFT + WIDTH
    targets = [layer for layer in LAYERS if any(layer in others for others in wanted.values())]
    channel = {target: right + 34 + CHANNEL * i for i, target in enumerate(targets)}
    out = {layer: top + 0.68 * height for layer, (top, height) in places.items()}
    for layer, others in wanted.items():
        if others:
            end = max(channel[other] for other in others)
            shapes.append(f"<path d='M{right} {out[layer]:.1f} H{end}' stroke='#b9bec6' stroke-width='1.2'/>")
    for colour, target in zip(COLOURS, targets, strict=False):
        users = [layer for layer in LAYERS if target in wanted[layer]]
        x, (top, height) = channel[target], places[target]
        into = top + 0.32 * height
        shapes.append(
            f"<path d='M{x} {out[users[0]]:.1f} V{into:.1f} H{right + 9}' stroke='{colour}' stroke-width='2' fill='none'/>"
        )
        shapes.append(f"<path d='M{right + 1} {into:.1f} l10 -5 v10 z' fill='{colour}'/>")
        shapes += [f"<circle cx='{x}' cy='{out[user]:.1f}' r='4' fill='{colour}'/>" for user in users]
    width, height = int(max(channel.values()) + 30), y + 8
    head = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' {FONT}>",
        "<title>Rooms of lightning_wdefense and what they import</title>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        _text(LEFT, 28, "The rooms of lightning_wdefense", 18, "#1f2733", bold=True),
        _text(
            LEFT,
            48,
            "A dot means: this room imports the room where the line ends. Imports point down only.",
            12.5,
            "#5a6472",
        ),
    ]
    return "\n".join([*head, *shapes, "</svg>", ""])


def _box(layer: str, y: int) -> tuple[list[str], int]:
    """The box of a room at a height, and how high it is."""
    path = PACKAGE / layer
    lines = textwrap.wrap(_plain(description(layer)), 105)
    inner = [] if not path.is_dir() else [each for each in folders(path) if each.parent == path]
    height = 34 + 16 * len(lines) + (27 if inner else 0)
    inside = sum(size(each) for each in [path, *folders(path)]) if path.is_dir() else _top_files(layer)
    files = f"{inside} file{'s' * (inside != 1)}"
    shapes = [
        f"<rect x='{LEFT}' y='{y}' width='{WIDTH}' height='{height}' rx='7' fill='#f5f7fa' stroke='#c4cad3'/>",
        _text(LEFT + 14, y + 22, title(layer), 15, "#1f2733", bold=True),
        _text(LEFT + WIDTH - 14, y + 22, files, 12, "#5a6472", end=True),
        *(_text(LEFT + 14, y + 40 + 16 * i, line, 12.5, "#3c4654") for i, line in enumerate(lines)),
    ]
    x, top = LEFT + 14, y + 32 + 16 * len(lines)
    for each in inner:
        label = f"{each.name} · {sum(size(below) for below in [each, *folders(each)])}"
        wide = 14 + round(6.4 * len(label))
        shapes.append(f"<rect x='{x}' y='{top}' width='{wide}' height='20' rx='10' fill='#e3e8f0'/>")
        shapes.append(_text(x + wide / 2, top + 14, label, 12, "#3c4654", middle=True))
        x += wide + 8
    return shapes, height


def _top_files(layer: str) -> int:
    """Number of files of a room that is no folder."""
    return sum(room(path.name) == layer for path in PACKAGE.glob("*.py"))


def _plain(text: str) -> str:
    return text.replace("``", "")


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    fill: str,
    *,
    bold: bool = False,
    end: bool = False,
    middle: bool = False,
) -> str:
    anchor = " text-anchor='end'" * end + " text-anchor='middle'" * middle
    weight = " font-weight='bold'" * bold
    return f"<text x='{x:g}' y='{y:g}' font-size='{size:g}' fill='{fill}'{weight}{anchor}>{escape(text)}</text>"


def table() -> str:
    """The rooms with their folders, the number of files in each, and what it is for."""
    rows = ["| room | files | what it is for |", "|---|---|---|"]
    for layer in LAYERS:
        path = PACKAGE / layer
        number = size(path) if path.is_dir() else _top_files(layer)
        rows.append(f"| **`{title(layer)}`** | {number} | {description(layer).replace('``', '`')} |")
        for each in folders(path) if path.is_dir() else []:
            name = each.relative_to(PACKAGE).as_posix()
            rows.append(f"| `{name}/` | {size(each)} | {summary(each).replace('``', '`')} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with its table made anew."""
    start, end = "<!-- rooms: made by docs/architecture.py -->", "<!-- end of rooms -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{table()}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Write the picture and the page."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture())
    PAGE.write_text(page(PAGE.read_text()))
    print(f"Wrote {PICTURE.relative_to(ROOT)} and the table of {PAGE.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()

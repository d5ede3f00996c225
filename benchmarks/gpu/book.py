"""What a run on a GPU found: one JSON file and one Markdown file for all stages, written again after every figure."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.shared.files import claimed, read, short_hash, write_atomically, write_text

DIGITS = 4
"""Significant digits that are kept of a figure."""
LINES = 60
"""Most lines of the table that is printed last."""

Row = dict[str, Any]


class Book:
    """The figures of all stages in a folder, shared by the processes that write them.

    ``gpu.json`` holds the card, the versions and, for each stage, its state, its seconds and its rows by name; ``gpu.md`` shows them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "gpu.json"
        # Elsewhere, so that nothing but figures is in the folder.
        self.lock = Path(tempfile.gettempdir()) / f"wdefense-gpu-{short_hash(str(folder.resolve()))}.lock"

    def content(self) -> dict[str, Any]:
        """All of it."""
        return {"about": {}, "stages": {}} | read(self.path)

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """What is in the book, which is written again with what the body changes."""
        with claimed(self.lock, wait=True):
            content = self.content()
            yield content
            write_atomically(self.path, content)
            write_text(self.folder / "gpu.md", markdown(content))

    def stage(self, name: str) -> dict[str, Any]:
        """One stage's part: empty if it has not begun."""
        return dict(self.content()["stages"].get(name, {}))

    def note(self, name: str, **facts: Any) -> None:
        """Facts of a stage, beside its rows."""
        with self.changing() as content:
            content["stages"].setdefault(name, {"rows": {}}).update(facts)

    def row(self, stage: str, name: str, found: Row) -> None:
        """A new row of a stage, or its new values."""
        with self.changing() as content:
            rows = content["stages"].setdefault(stage, {}).setdefault("rows", {})
            rows[name] = {key: rounded(value) for key, value in found.items()}
        print(
            f"{time.strftime('%M:%S')} {name}: {', '.join(f'{key} {value}' for key, value in rows[name].items())}",
            flush=True,
        )

    def measure(self, stage: str, name: str, compute: Callable[[], Row]) -> Row:
        """A row, which is computed unless it is there. A failure is a row too, which the next run tries again."""
        found = self.stage(stage).get("rows", {}).get(name)
        if found is not None and "error" not in found:
            return dict(found)
        try:
            found = compute()
        except Exception as error:  # one figure less, and not the stage
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        self.row(stage, name, found)
        return found


def rounded(value: Any) -> Any:
    """A figure to :data:`DIGITS` significant digits; anything else as it is. JSON knows no NaN."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def markdown(content: dict[str, Any]) -> str:
    """One section a stage."""
    parts = ["# On a GPU\n", ", ".join(f"{key} {value}" for key, value in content["about"].items()) + ".\n"]
    for name, stage in content["stages"].items():
        facts = ", ".join(f"{key} {value}" for key, value in stage.items() if key not in ("rows", "title", "about"))
        parts += [
            f"## {stage.get('title', name)}\n",
            *([f"{stage['about']}\n"] if stage.get("about") else []),
            f"{facts}.\n",
        ]
        parts += [table(stage.get("rows", {}))]
    return "\n".join(parts)


def table(rows: dict[str, Row]) -> str:
    """Markdown, with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    if not columns:
        return ""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_shown(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value).replace("|", "/")


def summary(book: Book) -> str:
    """One table of all, of at most :data:`LINES` lines: long stages lose rows of their middle."""
    stages = book.content()["stages"]
    room = LINES - 2 - len(stages)
    lines = [f"{'stage':10} {'figure':42} found", "-" * 100]
    for i, (name, stage) in enumerate(stages.items()):
        lines.append(f"{name:10} {stage.get('state', '?'):42} {stage.get('seconds', '')} s")
        rows = [(key, ", ".join(f"{k} {v}" for k, v in row.items())) for key, row in stage.get("rows", {}).items()]
        later = len(stages) - i - 1
        most = min(len(rows), max(0, room // (later + 1)))
        cut = len(rows) > most
        shown = rows if not cut else rows[: max(0, most - 1)]
        lines += [f"{'':10} {key[:42]:42} {text[:150]}" for key, text in shown]
        if cut and most:
            lines.append(f"{'':10} ... and {len(rows) - len(shown)} more in gpu.md")
        room -= min(most, len(rows))
    return "\n".join(lines[:LINES])

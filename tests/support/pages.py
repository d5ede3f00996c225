"""The pages of the repository, with their blocks of code, their headings and their links."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]  # fmt: skip
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.M)


def text(page: str) -> str:
    """What stands on a page."""
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in a language, without the indentation that they may have in a list."""
    found = FENCE.findall(text(page))
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, name, code in found if name == language]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text(page))


def anchors(page: str) -> set[str]:
    """The fragments by which the headings of a page can be linked, as MkDocs makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    ascii_ = [unicodedata.normalize("NFKD", each).encode("ascii", "ignore").decode() for each in plain]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", each).strip().lower()) for each in ascii_}


def links(page: str) -> list[tuple[str, str]]:
    """The links of a page to files and places of the repository: file (empty for the page itself) and fragment."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [tuple(target.partition("#")[::2]) for target in targets if "://" not in target]

"""What the site shows of the repository beside ``docs/``: measured tables, examples, changelog, contributing.

MkDocs calls the functions ``on_...`` (``hooks:`` in ``mkdocs.yml``). Nothing is copied by hand: the pages are made at each build, and links
of all pages, which are written for the repository, are turned to the pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
RESULTS, EXAMPLES = "benchmarks/results/", "examples/"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
NAMES = {"cpu": "CPU", "gpu": "GPU", "mnist": "MNIST", "h100": "H100"}
"""Words of file names that are written otherwise."""
LANGUAGES = {".py": "python", ".yaml": "yaml"}
WIDE = "---\nhide: [toc]\n---\n"
"""At the top of a page: its tables have the place of the table of contents too."""
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.M)
LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")

sources: dict[str, str] = {}
"""The file of the repository that a page of the site is made of, by the page's path."""


def address(path: str) -> str | None:
    """Where the site has a file of the repository, or None if it has not."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if path.startswith(RESULTS) and path.endswith((".md", ".png")):
        return "measured/" + path.removeprefix(RESULTS)
    if path.startswith(EXAMPLES):
        return f"examples/{path.split('/')[1].removesuffix('.py')}.md"
    return PAGES.get(path)


def results() -> list[str]:
    """The files with measured tables and their pictures."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / RESULTS).rglob("*"))
        if path.suffix in (".md", ".png")
    ]


def examples() -> dict[str, list[str]]:
    """The files of each example by its page."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / EXAMPLES).rglob("*")):
        if path.suffix in LANGUAGES:
            name = path.relative_to(ROOT).as_posix()
            found.setdefault(str(address(name)), []).append(name)
    return found


def words(path: str) -> str:
    """A title for a file."""
    name = " ".join(NAMES.get(word, word) for word in Path(path).stem.split("_"))
    return name[0].upper() + name[1:]


def on_config(config: Any) -> Any:
    """Append the pages that are made here to their sections."""
    sections = {title: pages for section in config.nav for title, pages in section.items() if isinstance(pages, list)}
    sections["Measured"] += [{words(path): address(path)} for path in results() if path.endswith(".md")]
    sections["Examples"] += [{words(page): page} for page in examples()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what is made of files beside ``docs/``."""

    def add(page: str, source: str, **content: Any) -> None:
        files.append(File.generated(config, page, **content))
        sources[page] = source

    for path in results():
        page = str(address(path))
        picture = (ROOT / path).with_suffix(".png")
        if path.endswith(".png"):
            add(page, path, abs_src_path=str(ROOT / path))
        else:
            shown = f"\n\n![The figures of this page as a picture]({picture.name})\n" if picture.exists() else ""
            add(page, path, content=WIDE + (ROOT / path).read_text() + shown)
    for page, paths in examples().items():
        add(page, f"examples/{Path(page).name}", content=example(page, paths))
    for path in ("CHANGELOG.md", "CONTRIBUTING.md"):
        add(PAGES[path], path, content=(ROOT / path).read_text())
    return files


def example(page: str, paths: list[str]) -> str:
    """The page of an example: its files."""
    parts = [f"# {words(page)}"]
    for path in paths:
        parts.append(f"`{path}`\n\n```{LANGUAGES[Path(path).suffix]}\n{(ROOT / path).read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository to pages of the site; what is not on the site is named without a link."""
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups()
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        there = address(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if there is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else unbroken(LINK.sub(turned, part)) for i, part in enumerate(parts))


def unbroken(text: str) -> str:
    """A text whose figures stay on one line with their intervals."""
    return text.replace(" ± ", "\u00a0±\u00a0")

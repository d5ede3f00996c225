"""Follows every link of the built site: ``python docs/site/links.py build/site``.

Links and pictures must lead to files of the site, fragments to an id on their page, and nothing may be loaded from elsewhere. It lists what does
not, and exits with 1. Links out of the site are not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links, the loaded files and the ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = {name: value for name, value in attrs if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])


def broken(site: Path) -> list[str]:
    """What is wrong with the links of a built site, as lines of text."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in [*page.links, *page.loaded]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            there = pages.get(site.resolve() / target.relative_to(site.resolve())) if target.exists() else None
            if not target.exists():
                found.append(f"{name} links {url}, which does not exist")
            elif parts.fragment and there is not None and unquote(parts.fragment) not in there.ids:
                found.append(f"{name} links {url}, which has no such place")
    return found


def main() -> None:
    """Check the site that is named on the command line."""
    site = Path(sys.argv[1]).resolve()
    found = broken(site)
    print(*found, f"{len(list(site.rglob('*.html')))} pages, {len(found)} links that lead nowhere.", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

"""What the pages beside README say of names, files and versions is so."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex

import pytest
import yaml
from packaging.version import Version
from support.pages import PAGES, ROOT, anchors, blocks, links, text

import lightning_wdefense

GLOSSARY, CONTRIBUTING, COMPATIBILITY = map(text, ("docs/glossary.md", "CONTRIBUTING.md", "docs/compatibility.md"))
PYPROJECT = text("pyproject.toml")


def entries() -> dict[str, str]:
    """The glossary's entries by their terms."""
    text = GLOSSARY.split("## Papers")[0]
    return {entry.split("**")[0]: entry for entry in re.split(r"^- \*\*", text, flags=re.M)[1:]}


@pytest.mark.parametrize("term", entries())
def test_names_in_the_glossary_exist(term):
    code = entries()[term].partition("*Code*:")[2].partition("*Paper*:")[0]
    found = None
    for name in re.findall(r"`([\w.]+\b=?)`", code):
        if name.endswith("="):
            assert name[:-1] in inspect.signature(found).parameters, f"{name} of {found}"
        else:
            room, *attributes = name.split(".")
            if not attributes:
                continue
            found = importlib.import_module(f"lightning_wdefense.{room}")
            assert attributes[0] in found.__all__, f"{name} is not public"
            for attribute in attributes:
                found = getattr(found, attribute, None) or found.__annotations__[attribute]


def test_every_term_that_was_asked_for_is_in_the_glossary():
    text = " ".join(entries()).lower()
    for term in (
        "threat model",
        "budget",
        "surrogate",
        "marginal error",
        "dual potentials",
        "projection",
        "recipe",
        "certificate",
    ):
        assert term in text


def test_every_paper_of_the_glossary_is_listed_and_used():
    text, papers = GLOSSARY.split("## Papers")
    listed = {
        (authors.split(", ")[0], authors.count(", ") + 1, year)
        for authors, year in re.findall(r"^- ([^:]+): .*?(\d{4})\.$", papers, re.M)
    }
    cited = set()
    for names, year in re.findall(
        r"(\w+(?: and \w+| et al\.)?) (\d{4})", " ".join(re.findall(r"\*Paper\*: (.*)", text))
    ):
        first = names.split()[0]
        cited.add((first, year))
        numbers = {number for author, number, when in listed if (author, when) == (first, year)}
        assert numbers, f"{names} {year} is not listed"
        assert any((number > 2) == names.endswith("al.") for number in numbers), f"{names} {year}"
    assert cited == {(author, year) for author, _, year in listed}


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == lightning_wdefense.__version__
    assert re.search(r"^cff-version: (.*)$", citation, re.M)[1] == "1.2.0"
    assert re.search(r"^license: (.*)$", citation, re.M)[1] == re.search(r'^license = "(.*)"$', PYPROJECT, re.M)[1]


def test_the_table_of_versions_has_what_is_declared():
    declared = dict(
        re.findall(r'"([\w-]+)((?:>=|\[signatures\]>=)[^"]*)"', PYPROJECT.split("[project.optional-dependencies]")[0])
    )
    for extra in re.findall(r"^(?!all|examples|dev|bench)\w+ = \[(.*)\]$", PYPROJECT, re.M):
        declared |= dict(re.findall(r'"([\w-]+)(?:\[\w+\])?(>=[^"]*)"', extra))
    rows = dict(re.findall(r"^\| ([\w-]+) \| `([^`]*)`", COMPATIBILITY, re.M))
    assert rows.pop("Python") == re.search(r'requires-python = "(.*)"', PYPROJECT)[1]
    assert {"torch", "lightning", "geomloss", "wandb"} < rows.keys()
    assert rows == declared


def test_the_oldest_versions_are_those_that_are_declared():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.M))
    declared = PYPROJECT.split("\ndev = ")[0].split("\ndependencies = ")[1]
    bounds = dict(re.findall(r'"([\w-]+)(?:\[signatures\])?>=([\d.]+)[^"]*"', declared))
    for name in ("ruff", "mypy"):  # the linters' versions are no matter of the package
        del bounds[name]
    assert bounds.keys() == pins.keys() - {"pytorch-lightning", "torchvision"}
    for name, bound in bounds.items():
        assert Version(pins[name]) == Version(bound), name
    assert pins["pytorch-lightning"] == pins["lightning"]


def test_files_that_contributors_are_shown_exist():
    named = re.findall(r"`((?:attacks|defenses|detection|metrics|tests|docs|benchmarks)/[\w./]*)`", CONTRIBUTING)
    assert len(named) > 12
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "lightning_wdefense" / path).exists(), path
    for table, path in re.findall(r"`([A-Z_]+)` in `([\w./]+)`", CONTRIBUTING):
        place = next(root / path for root in (ROOT, ROOT / "lightning_wdefense") if (root / path).exists())
        assert re.search(rf"^{table}\b.*=", place.read_text(), re.M), f"{table} in {path}"


COMMANDS = {
    page: [
        shlex.split(line, comments=True)
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for page in PAGES
}
"""The commands in a page's blocks, as words."""
SUBCOMMANDS = {"evaluate", "audit", "compare"}


@pytest.mark.parametrize("page", [page for page in PAGES if any(COMMANDS[page])])
def test_commands_name_what_exists(page):
    sessions = set(re.findall(r"^def (\w+)\(session", text("noxfile.py"), re.M))
    for command in COMMANDS[page]:
        for word in command:
            if re.match(r"(tests|docs|examples|lightning_wdefense)/", word):
                assert (ROOT / word).exists(), command
            if word.startswith("benchmarks."):
                assert (ROOT / word.replace(".", "/") / "__main__.py").exists(), command
        if command[:2] == ["nox", "-s"]:
            assert command[2].split("-")[0] in sessions, command
        if command[:1] == ["lightning-wdefense"]:
            assert command[1] in SUBCOMMANDS, command


def test_contributors_are_shown_commands():
    assert len(COMMANDS["CONTRIBUTING.md"]) > 12


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for file, fragment in links(page):
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), file
        if fragment:
            assert fragment in anchors(target.relative_to(ROOT).as_posix()), f"{file}#{fragment}"


SITE = yaml.safe_load(text("mkdocs.yml"))
MADE = {"contributing.md", "changelog.md"}
"""Pages of the site that docs/site/hooks.py makes of files beside docs/; those of tables and examples it adds itself."""


def shown(nav: list) -> list[str]:
    """The pages that a part of the site's navigation names."""
    found = []
    for entry in nav:
        (value,) = entry.values() if isinstance(entry, dict) else (entry,)
        found += shown(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_on_the_site():
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(shown(SITE["nav"])) == sorted([*pages, *MADE])


def test_every_room_has_a_page_of_reference():
    rooms = {
        re.match(r"# lightning_wdefense\.(\w+)$", text(page), re.M)[1]: text(page)
        for page in PAGES
        if page.startswith("docs/reference/") and not page.endswith("index.md")
    }
    package = ROOT / "lightning_wdefense"
    public = {path.parent.name for path in package.glob("*/__init__.py") if "__all__" in path.read_text()}
    assert rooms.keys() == public | {"mixin"}
    assert all(f"::: lightning_wdefense.{room}\n" in page for room, page in rooms.items())


def test_the_site_loads_nothing_from_elsewhere():
    assert SITE["theme"]["font"] is False
    assert not any("://" in str(each) for key in ("extra_css", "extra_javascript") for each in SITE.get(key, []))


_spec = importlib.util.spec_from_file_location("links", ROOT / "docs" / "site" / "links.py")
site_links = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site_links)


def test_links_of_a_built_site_are_followed(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "page.html").write_text("<h2 id=here>Here</h2> <a href=../index.html>back</a>")
    good = "<a href=more/page.html#here>a</a> <a href=https://example.org>b</a> <a href=#top>c</a> <p id=top>"
    (tmp_path / "index.html").write_text(good)
    assert site_links.broken(tmp_path) == []
    bad = "<a href=more/page.html#there>a</a> <img src=gone.png> <script src=https://example.org/it.js></script>"
    (tmp_path / "index.html").write_text(bad)
    assert site_links.broken(tmp_path) == [
        "index.html loads https://example.org/it.js",
        "index.html links more/page.html#there, which has no such place",
        "index.html links gone.png, which does not exist",
    ]


def test_the_reference_names_what_the_top_level_exports():
    rows = text("docs/reference/index.md").split("| room | what it is for |")[0]
    assert set(re.findall(r"`(\w+)`", rows)) - {"lightning_wdefense"} == set(lightning_wdefense.__all__)

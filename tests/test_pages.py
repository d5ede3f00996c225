"""What the pages beside README say of names, files and versions is so."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from packaging.version import Version

import lightning_wdefense

ROOT = Path(__file__).parents[1]
GLOSSARY, CONTRIBUTING, COMPATIBILITY = (
    (ROOT / page).read_text() for page in ("docs/glossary.md", "CONTRIBUTING.md", "docs/compatibility.md")
)
PYPROJECT = (ROOT / "pyproject.toml").read_text()


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
    declared |= dict(re.findall(r'^\w+ = \["([\w-]+)(?:\[\w+\])?(>=[^"]*)"\]$', PYPROJECT, re.M))
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


def test_commands_that_contributors_are_shown_name_what_exists():
    blocks = re.findall(r"```bash\n(.*?)```", CONTRIBUTING, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(commands) > 12
    for command in commands:
        for word in command:
            if re.match(r"(tests|docs|lightning_wdefense)/", word):
                assert (ROOT / word).exists(), command
            if word.startswith("benchmarks."):
                assert (ROOT / word.replace(".", "/") / "__main__.py").exists(), command


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target

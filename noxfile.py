"""Environments with other versions of what the package needs: ``nox -l`` lists them, and docs/compatibility.md has what they found.

A session takes a part (``nox -s oldest -- smoke``), arguments of pytest (``nox -s oldest -- tests/attacks -k fgsm``), or nothing, for
all of the tests. The packages come from the index that pip is configured with.
"""

from __future__ import annotations

import re

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["newest-3.11"]

OLDEST = ".ci/oldest.txt"
"""Constraints: the lowest versions that pyproject.toml declares."""
ROOMS = [
    f"tests/{room}" for room in ("attacks", "defenses", "detection", "metrics", "modules", "pipelines", "transport")
]
CALLBACKS = ["tests/callbacks", "tests/test_mixin.py"]
PARTS = {
    "smoke": [
        "tests/attacks/gradient",
        "tests/callbacks/test_monitor_environments.py",
        "tests/callbacks/test_through.py",
        "tests/metrics",
        "tests/test_mixin.py",
    ],
    "compile": [*CALLBACKS, "tests/attacks", "tests/modules", "-k", "compile or execution or eager or isolation"],
}
"""What ``-- smoke`` and ``-- compile`` stand for."""
LINTERS = {"ruff", "mypy"}


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml declares for these extras, beside what is declared for everyone."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    found = list(project["dependencies"])
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = re.match(rf"{project['name']}\[(.*)\]", requirement)
            found += requirements(*own[1].split(",")) if own else [requirement]
    return [each for each in dict.fromkeys(found) if re.split(r"[^\w-]", each)[0] not in LINTERS]


def run(session: nox.Session, tests: list[str]) -> None:
    """Run a part of the tests, or those that the session was given, or these."""
    given = session.posargs
    if given and given[0] in PARTS:
        given = [*PARTS[given[0]], *given[1:]]
    session.run("python", "-m", "pytest", *(given or tests))


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The lowest versions that are declared."""
    session.install(*requirements("test"), "-c", OLDEST)
    session.install("--no-deps", "-e", ".")
    run(session, [*CALLBACKS, *ROOMS])


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """The newest versions, on each Python."""
    session.install(*requirements("test"))
    session.install("--no-deps", "-e", ".")
    run(session, [*CALLBACKS, *ROOMS])


@nox.session(python="3.11")
def pytorch_lightning(session: nox.Session) -> None:
    """``pytorch_lightning``, and no ``lightning``."""
    others = [each for each in requirements("test") if not each.startswith("lightning")]
    session.install(*others, "pytorch-lightning>=2.4")
    session.install("--no-deps", "-e", ".")
    session.run("python", "-c", "import importlib.util as util; assert util.find_spec('lightning') is None")
    run(session, CALLBACKS)


@nox.session(python="3.11")
@nox.parametrize(("torch", "lightning"), [("2.4.0", "2.6.6"), ("2.14.1", "2.4.0")])
def mixed(session: nox.Session, torch: str, lightning: str) -> None:
    """An old PyTorch with a new Lightning, and the other way round."""
    session.install(
        *requirements("test"), f"torch=={torch}", f"lightning=={lightning}", f"pytorch-lightning=={lightning}"
    )
    session.install("--no-deps", "-e", ".")
    run(session, CALLBACKS)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in ``build/site``, with every link followed."""
    session.install("-r", "docs/requirements.txt")
    session.run("mkdocs", "build", "--strict")
    session.run("python", "docs/site/links.py", "build/site")

"""One planted fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody could make, and the tests that should see it.

    Attributes:
        what: the fault in a few words.
        file: in the package.
        text: what the file says; exactly once.
        instead: what it says with the fault.
        tests: the smallest set of tests that should see it, by their node ids.
        survives: why no test can see it, if none can.
    """

    what: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]
    survives: str = ""

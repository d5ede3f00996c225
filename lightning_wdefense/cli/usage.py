"""Wrong usage of the command, or bad input to it."""

from __future__ import annotations

import sys


class UsageError(Exception):
    """What was wrong with a command or its input, and what to do: one sentence or two, shown without a traceback."""


def note(text: str) -> None:
    """Tell something beside the result, on the standard error."""
    print(text, file=sys.stderr, flush=True)

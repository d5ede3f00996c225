"""The command ``lightning-wdefense``: from its words to its exit status."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_wdefense.cli.usage import UsageError, note

FINE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses. A Python program that ends in a traceback returns 1, so that errors must not end so: 1 is for a model that is not good enough."""

NAME = "lightning-wdefense"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its words, without the name of the program; by default those of the process.

    Returns:
        The exit status: 0 if all is fine, 1 if the model does not reach ``--min-robust-acc`` or the audit failed, 2 for wrong usage,
        bad input and any other error, 130 if it was interrupted.

    Example:
        >>> main(["compare", "no-such-folder"])  # on the standard error: There is no report in no-such-folder: ...
        2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    with _surroundings():
        try:
            _check_extra()
            from lightning_wdefense.cli.parsing import parsed
            from lightning_wdefense.cli.runs import RUNS

            command, options = parsed([word for word in words if word != "--debug"])
            return FAILED if RUNS[command](options) else FINE
        except SystemExit as end:  # of --help, --version and --print_config
            return int(end.code or 0) if not isinstance(end.code, str) else WRONG_USAGE
        except KeyboardInterrupt as error:
            note(f"{NAME}: {error or 'interrupted.'}")
            return INTERRUPTED
        except Exception as error:
            if debug:
                traceback.print_exc()
            note(_sentence(error, debug))
            return WRONG_USAGE


def _check_extra() -> None:
    needed = ("jsonargparse", "docstring_parser", "typeshed_client")  # jsonargparse[signatures]
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise UsageError('the command needs jsonargparse: pip install "lightning-wdefense[cli]"')


def _sentence(error: Exception, debug: bool) -> str:
    """What is shown of an error: where it happened as well, if its message was not written here."""
    if isinstance(error, UsageError):
        return f"{NAME}: error: {error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(__file__).parents[1] in Path(place.filename).parents
    if ours and isinstance(error, (ValueError, TypeError)):
        return f"{NAME}: error: {error}"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    more = "" if debug else "; --debug shows the way there"
    return f"{NAME}: error: {text}\n({place.filename}, line {place.lineno}{more})"


@contextmanager
def _surroundings() -> Iterator[None]:
    """Classes of the working directory can be imported, as with ``python -m``, and warnings are lines without the place in the code."""
    path, form, here = list(sys.path), warnings.formatwarning, os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)

    def line(message: Any, *_: Any, **__: Any) -> str:
        return f"{NAME}: warning: {message}\n"

    try:
        warnings.formatwarning = line
        yield
    finally:
        warnings.formatwarning = form
        sys.path[:] = path

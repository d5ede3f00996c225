"""What a misspelt key or class path of a configuration file was perhaps meant to be."""

from __future__ import annotations

import contextlib
import pkgutil
import re
from collections.abc import Iterator
from typing import NoReturn

from jsonargparse import ArgumentParser

from lightning_wdefense._names import unknown_name

try:
    from lightning.pytorch.cli import LightningArgumentParser
except ImportError:  # pragma: no cover - a pipeline that has only the old package
    from pytorch_lightning.cli import LightningArgumentParser  # type: ignore[no-redef, assignment]

# How jsonargparse says these.
_UNKNOWN_ARGUMENT = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


def suggestions(message: str) -> list[str]:
    """Which arguments or classes were perhaps meant, for an error message of jsonargparse.

    Args:
        message: the error message.

    Returns:
        A sentence for each unknown argument or class that resembles a known one.

    Example:
        >>> suggestions("Problem with given class_path 'lightning_wdefense.ThreatModel': Option 'esp' is not accepted")
        ["There is no argument of ThreatModel 'esp'. Did you mean 'eps'? Known: 'norm', 'eps', 'bounds', 'mean', 'std'."]
    """
    return [text for text in dict.fromkeys(_unknown(message)) if "Did you mean" in text]


def _unknown(message: str) -> Iterator[str]:
    for path, argument in _UNKNOWN_ARGUMENT.findall(message):
        place, _, name = path.rpartition(".")
        found, owner, parser = pkgutil.resolve_name(path), pkgutil.resolve_name(place), ArgumentParser()
        if isinstance(found, type):
            added = parser.add_class_arguments(found, fail_untyped=False)
        elif isinstance(owner, type):  # a class method that makes an object, such as Recipe.named
            added = parser.add_method_arguments(owner, name, fail_untyped=False)
        else:
            added = parser.add_function_arguments(found, fail_untyped=False)
        yield unknown_name(f"argument of {name}", argument, dict.fromkeys(each.split(".")[0] for each in added))
    for path, name in _UNKNOWN_CLASS.findall(message):
        module = pkgutil.resolve_name(path)
        yield unknown_name(f"class in {path}", name, getattr(module, "__all__", vars(module)))


class SuggestingParser(LightningArgumentParser):
    """The parser of ``LightningCLI``, with errors that end in what a misspelt key or class path was perhaps meant to be.

    Without it jsonargparse refuses a misspelt key as well, before anything is trained, but names no other.
    Lightning 2.4 has no ``parser_class=``; 2.6.6 has.

    Example:
        ``LightningCLI(MyModule, MyData, parser_class=SuggestingParser)``
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message and the :func:`suggestions` for it, which stand last, below the long message."""
        found: list[str] = []
        with contextlib.suppress(Exception):  # whatever class the message names: no fault in it may hide the message
            found = suggestions(message)
        super().error("\n".join([message, *found]), ex)

"""A parser for the shell: short help, and errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter

import lightning_wdefense.cli.class_paths as class_paths
from lightning_wdefense._names import unknown_name
from lightning_wdefense.cli.suggesting import SuggestingParser, suggestions
from lightning_wdefense.cli.usage import UsageError


class ShortHelp(DefaultHelpFormatter):
    """Help without the types, whose known subclasses fill pages."""

    def _get_help_string(self, action: Any) -> str:
        if getattr(action, "_typehint", None) is None:
            return super()._get_help_string(action)
        text = re.sub(r":\w+:`~?([^`]*)`", r"\1", action.help or "").replace("``", "")  # of docstrings
        return text + ("" if action.default in (None, argparse.SUPPRESS) else " (default: %(default)s)")


class CommandParser(SuggestingParser):
    """A parser whose errors are one line, with what was perhaps meant."""

    commands: Mapping[str, CommandParser] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message in one line.

        Raises:
            UsageError: unless this parser is a part of another one, whose message will hold this one.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        found: list[str] = []
        with contextlib.suppress(Exception):  # no fault in a suggestion may hide the message
            found = [text for text in suggestions(message) if "argument of" in text]
        raise UsageError(" ".join(found) or self._in_one_line(message)) from ex

    def _in_one_line(self, message: str) -> str:
        if match := re.search(r'key "(model|data)":.*the following arguments are required: (\w+)', message, re.S):
            stored = ", or a --checkpoint that stores it" if match[1] == "model" else ""
            return f"--{match[1]}: the class needs {match[2]!r}: give --{match[1]}.{match[2]}{stored}."
        if match := re.search(r"unrecognized arguments: (--[\w.+-]+)", message):
            known = [each for action in self._actions for each in action.option_strings if each.startswith("--")]
            known = [each for each in known if not each.endswith(("+", ".help"))]
            return unknown_name("option", match[1], known).split(" Known:")[0] + " See --help."
        for path in re.findall(r"class_path '([\w.]+)'", message):
            try:
                class_paths.imported(path)
            except UsageError as error:
                return str(error)
        if match := re.search(r"Subcommand '(\w+)' does not accept option '([\w.-]+)'", message):
            known = [action.dest for action in self.commands[match[1]]._actions]
            return unknown_name("option", match[2], known).split(" Known:")[0] + " See --help."
        if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            return unknown_name("command", match[1], re.findall(r"\w+", match[2]))
        if match := re.search(r'key "([\w.]+)":\s+Expected a typing.Literal\[(.*)\]. Got value: (.*)', message):
            name = "--" + match[1].replace("_", "-")
            return unknown_name(f"value of {name}", match[3], re.findall(r"'(\w+)'", match[2]))
        message = re.sub(
            r"Does not validate against any of the Union subtypes\s+Subtypes: .*\s+Errors:\s+- ", "", message
        )
        message = re.sub(r"\s+- Expected a <class 'str'>.*|\s+Given value type: .*", "", message, flags=re.S)
        message = re.sub(
            r"Expected a <class '(\w+)'>. Got value: (.*)", r"it takes a value of the type \1, got \2.", message
        )
        return re.sub(r'^Parser key "([\w.]+)":', r"--\1:", " ".join(message.split()))

"""Reads docstrings as this package writes them: roles, ``:class:`~package.Name```, become links of the API reference, examples code.

An extension of griffe, which reads the docstrings for mkdocstrings. A name that the reference does not show stays code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.M)
"""griffe takes what follows for code in the plural only."""
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)([^`]+)`")


def plain(match: re.Match[str]) -> str:
    """A role as a link where there is something to link to."""
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    if "." not in name:
        return f"`{shown}`"
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'


class Roles(griffe.Extension):
    """The extension: it changes the text of every docstring that is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", ROLE.sub(plain, obj.docstring.value))

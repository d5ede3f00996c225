"""Errors about names: say what exists and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for a name that does not exist, with the nearest ones that do.

    Args:
        kind: what the name should have named, e.g. ``"attack"``.
        name: what was given.
        known: the names that exist.
    """
    known = list(known)
    lowered = {each.lower(): each for each in known}
    near = [lowered[match] for match in difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.4)]
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"There is no {kind} {name!r}.{meant} Known: {', '.join(map(repr, known))}."

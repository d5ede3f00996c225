"""What users may name: resolved, or an error that says what exists and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


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


def resolved(
    option: str, kind: type[T], given: Sequence[str | T] | Mapping[str, str | T], make: Callable[[str], T], example: str
) -> dict[str, T]:
    """Several objects by name, each name once.

    Args:
        option: the user's argument that they come from, a plural such as ``"attacks"``.
        kind: of the objects, which have a ``name``.
        given: names, objects, or a mapping from names of the user's own to either.
        make: an object from its name.
        example: a name that exists.

    Raises:
        TypeError: for what is neither a name nor such an object.
        ValueError: for two of a name, none at all, or one that is not in a list; and what ``make`` raises.
    """
    if isinstance(given, (str, kind)):
        raise ValueError(f"{option}= takes a sequence or a mapping: write {option}=[{given!r}].")
    pairs = given.items() if isinstance(given, Mapping) else [(None, each) for each in given]  # type: ignore[union-attr]
    found: dict[str, T] = {}
    for name, each in pairs:
        made = make(each) if isinstance(each, str) else each
        if not isinstance(made, kind):
            raise TypeError(
                f"{option}= takes names and {kind.__name__} objects, got a {type(made).__name__}: {made!r}."
            )
        key = name or (each if isinstance(each, str) else made.name)  # type: ignore[attr-defined]
        if key in found:
            raise ValueError(f"Two {option} are called {key!r}: give {option}= as a mapping from names of your own.")
        found[key] = made
    if not found:
        raise ValueError(f"{option}= is empty: name at least one, such as {example!r}.")
    return found

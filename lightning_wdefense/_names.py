"""Look up objects by name, with error messages that list the known names and the most similar ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Error message for an unknown name, with the most similar known names.

    Args:
        kind: the kind of object, such as ``"attack"``.
        name: the unknown name.
        known: all known names.
    """
    known = list(known)
    lowered = {each.lower(): each for each in known}
    near = [lowered[match] for match in difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.4)]
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"There is no {kind} {name!r}.{meant} Known: {', '.join(map(repr, known))}."


def resolved(
    option: str, kind: type[T], given: Sequence[str | T] | Mapping[str, str | T], make: Callable[[str], T], example: str
) -> dict[str, T]:
    """Make several objects from their names, and check that each name occurs once.

    Args:
        option: the name of the user's argument, a plural such as ``"attacks"``.
        kind: the class of the objects, which have a ``name``.
        given: names, objects, or a mapping from the user's own names to either.
        make: makes an object from its name.
        example: a known name, for the error message.

    Returns:
        The objects by name, in the order given.

    Raises:
        TypeError: if something is neither a name nor an object of this class.
        ValueError: if a name occurs twice, nothing is given, or a single name is given instead of a sequence; also what
            ``make`` raises.
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

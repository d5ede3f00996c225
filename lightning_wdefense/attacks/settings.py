"""Checks of the settings of attacks."""

from __future__ import annotations


def check_counts(owner: object, *names: str) -> None:
    """Refuse settings of an object, by name, that are below 1.

    Raises:
        ValueError: the message names the first and its value.
    """
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(owner, name)}.")

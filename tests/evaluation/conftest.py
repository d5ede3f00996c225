"""Settings for the tests of evaluations."""

from __future__ import annotations

from support.random_state import seeded_tests

__all__ = ["seeded_tests"]

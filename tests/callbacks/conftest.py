"""Settings for the tests of the callbacks."""

from __future__ import annotations

from support.random_state import one_thread, seeded_tests

__all__ = ["one_thread", "seeded_tests"]

"""Every test of the modules starts from the same random state."""

from support.random_state import seeded_tests

__all__ = ["seeded_tests"]

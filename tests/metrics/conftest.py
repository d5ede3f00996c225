"""Every test starts from the same random state, whatever ran before."""

from support.random_state import seeded_tests

__all__ = ["seeded_tests"]

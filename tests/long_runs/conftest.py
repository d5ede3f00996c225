"""Settings for the tests of long runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.random_state import seeded_tests

__all__ = ["seeded_tests"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """So that sums have one order in all processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

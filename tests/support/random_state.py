"""Tests that start from the same random state, and whose sums have one order."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import scipy
import torch
from packaging.version import Version

SCIPY_SEED: dict[str, int] = {"rng" if Version(scipy.__version__) >= Version("1.15") else "random_state": 0}
"""The keyword argument that seeds a function of SciPy."""


@pytest.fixture(autouse=True)
def seeded_tests() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small threads only wait for each other; and sums have one order in all processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

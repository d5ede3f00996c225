"""Tests that start from the same random state."""

from __future__ import annotations

import random

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

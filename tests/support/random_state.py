"""Tests that start from the same random state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_tests() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)

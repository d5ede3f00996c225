"""The matrix itself."""

from __future__ import annotations

from pipelines.runs import BY_NAME, DEFENDABLE, REFUSED
from pipelines.table import PIPELINES


def test_matrix_is_large_enough() -> None:
    assert len(BY_NAME) == len(PIPELINES)
    assert len(DEFENDABLE) + len(REFUSED) >= 46

"""The matrix itself: what is written by hand is what the modules do. Nothing of ours runs here."""

from __future__ import annotations

import pytest
from pipelines.attack import scores
from pipelines.pipeline import Pipeline
from pipelines.runs import BY_NAME, DEFENDABLE, MONITORED, REFUSED, over, plain, require
from pipelines.table import PIPELINES


def test_matrix_is_large_enough() -> None:
    assert len(BY_NAME) == len(PIPELINES)
    assert len(DEFENDABLE) + len(REFUSED) >= 46


@over(MONITORED)
def test_score_by_hand_is_what_the_module_logs(pipeline: Pipeline) -> None:
    require(pipeline)
    run = plain(pipeline.name)
    clean, _ = scores(pipeline, run.module, run.loader, steps=1)
    assert float(run.logged[pipeline.metric]) == pytest.approx(clean, rel=1e-4)


@over(DEFENDABLE)
def test_own_attack_hurts(pipeline: Pipeline) -> None:
    require(pipeline)
    run = plain(pipeline.name)
    clean, robust = scores(pipeline, run.module, run.loader)
    assert pipeline.improvement(robust, clean) > 0.1

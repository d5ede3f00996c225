"""Trainings that several tests look at."""

from __future__ import annotations

import functools

import pytest
from pipelines.pipeline import Pipeline
from pipelines.table import PIPELINES
from pipelines.training import Run, fit

BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}
DEFENDABLE = [pipeline for pipeline in PIPELINES if pipeline.refused is None]
MONITORED = [pipeline for pipeline in DEFENDABLE if pipeline.metric is not None]
REFUSED = [pipeline for pipeline in PIPELINES if pipeline.refused is not None]


def over(pipelines: list[Pipeline]) -> pytest.MarkDecorator:
    """The test, for each of the pipelines."""
    return pytest.mark.parametrize("pipeline", pipelines, ids=str)


def require(pipeline: Pipeline) -> None:
    """Skip where a package is missing."""
    if pipeline.needs is not None:
        pytest.importorskip(pipeline.needs)


@functools.cache
def plain(name: str) -> Run:
    """The pipeline trained without us. Leave it as it is."""
    return fit(BY_NAME[name])
